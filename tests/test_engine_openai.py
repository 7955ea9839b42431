"""`--engine openai` against the tests' own server, well and in every kind of trouble."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import logging
import math
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tenacity", reason="needs the server extra: pip install 'robustft[server]'")
from commandline import quiz, read, write
from faulty_server import FAULTS, FaultyServer, send_json
from scripted import LetterEmbedder

from robustft.cleaning import run_clean
from robustft.config import CleanConfig, EngineConfig, ExpertConfig
from robustft.engines import (
    Choice,
    Engine,
    Failure,
    Generation,
    Message,
    Prompt,
    ResponseScore,
    connection,
)
from robustft.engines.factory import load_engine
from robustft.engines.http import JsonClient
from robustft.engines.probing import connect
from robustft.engines.tokens import piece_offsets
from robustft.engines.wire import read_echo
from robustft.errors import EngineLost, UserError

KEY = "sk-test-0123456789abcdefSECRET"
VOCABULARY = 271


@dataclass(frozen=True)
class Size:
    requests: int
    records: int  # of a run that sends as many, even where much follows from what was given up
    lasting: int  # one request in as many is struck at every try

    def struck(self, digest: int, tries: int) -> bool:
        """A third twice, some for ever."""
        return digest % self.lasting == 0 or (digest % 3 == 0 and tries < 2)


SIZES = [
    pytest.param(Size(10, 4, 5), id="few"),
    pytest.param(Size(200, 50, 20), id="many", marks=pytest.mark.slow),
]
# Seconds until these are given up; the others need no patience.
PATIENCE = {"no_reply_in_time": 0.3, "one_byte_at_a_time": 0.3}
# A chat server counts its own tokens and has no ids, and a single token no neighbour to shift to.
HARMLESS = {
    ("chat", kind)
    for kind in (
        "prompt_cut_in_silence", "shifted_logprobs", "token_id_below_zero", "token_id_beyond_all",
    )
}  # fmt: skip
# The server's own threads must not fail: a fault that never left it would pass for one withstood.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = FaultyServer(VOCABULARY)
    yield made
    made.close()


def client(
    server: FaultyServer, retries: int = 3, timeout: float = 30.0, longest_wait: float = 0.05
) -> JsonClient:
    return JsonClient(
        server.url, concurrency=16, timeout=timeout, retries=retries, backoff=0.005,
        longest_wait=longest_wait, largest=2**22,
    )  # fmt: skip


def config(server: FaultyServer, tiny_model: Path | None) -> EngineConfig:
    tokenizer = None if tiny_model is None else str(tiny_model)
    return EngineConfig(engine="openai", base_url=server.url, tokenizer=tokenizer)


def engine(server: FaultyServer, tiny_model: Path | None, **options: float) -> Engine:
    server.completions = tiny_model is not None
    return connect(config(server, tiny_model), client(server, **options))  # type: ignore[arg-type]


def questions(count: int) -> tuple[list[Prompt], list[tuple[str, ...]]]:
    prompts = [Prompt((Message("user", f"Question {i}?"),), "Answer:") for i in range(count)]
    return prompts, [(" A", " B", " C")] * count


def clean(path: Path, out: Path, made: Engine) -> None:
    experts = ExpertConfig(rounds=1, reasoning_tokens=4)
    config = CleanConfig(input=str(path), out=out, detector="paper", experts=experts)
    run_clean(config, engine=made, embedder=LetterEmbedder())


class Healthy:
    """What a server without faults leads to, found once for all kinds of fault."""

    def __init__(self, tiny_model: Path, folder: Path) -> None:
        self.tiny_model = tiny_model
        self.folder = folder
        self.server = FaultyServer(VOCABULARY)
        self.choices = functools.cache(self._choices)
        self.verdicts = functools.cache(self._verdicts)

    def _choices(self, mode: str, count: int) -> Sequence[Choice | Failure]:
        tokenizer = None if mode == "chat" else self.tiny_model
        return engine(self.server, tokenizer).choose(*questions(count))

    def _verdicts(self, records: int) -> bytes:
        out = self.folder / str(records)
        source = write(self.folder / f"{records}.jsonl", quiz(records))
        clean(source, out, engine(self.server, self.tiny_model))
        return (out / "verdicts.jsonl").read_bytes()


@pytest.fixture(scope="module")
def healthy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Healthy]:
    made = Healthy(tiny_model, tmp_path_factory.mktemp("healthy"))
    yield made
    made.server.close()


# --- a healthy server -----------------------------------------------------------------------------


def test_what_the_probe_finds_is_used_and_told(server: FaultyServer, tiny_model: Path) -> None:
    made = engine(server, tiny_model)
    assert isinstance(made, Engine)
    assert made.abilities.choose
    assert made.abilities.score
    assert made.abilities.nll
    assert not made.abilities.entropy
    assert made.model_id == "hash-model"
    assert "given text is scored (prompt_logprobs), within 0.000" in "; ".join(made.abilities.found)


def test_generation_choice_and_score_are_the_models_own(
    server: FaultyServer, tiny_model: Path
) -> None:
    made = engine(server, tiny_model)
    prompts, candidates = questions(5)
    encoder = made.encoder  # type: ignore[attr-defined]
    for ids, said in zip(encoder.encode(prompts), made.generate(prompts, 9), strict=True):
        assert isinstance(said, Generation)
        tokens: list[int] = []
        nll = []
        while len(tokens) < 9:
            row = server.model.logprobs([*ids, *tokens])
            if row.argmax() == 2:
                break
            tokens.append(int(row.argmax()))
            nll.append(-row.max())
        assert said.text == encoder.decode(tokens)[0]
        assert len(said.offsets) == len(tokens) + 1
        np.testing.assert_allclose(said.nll, nll, atol=1e-5)
        assert np.isnan(said.entropy).all()
        assert said.finished == (len(tokens) < 9)
    for ids, choice in zip(encoder.encode(prompts), made.choose(prompts, candidates), strict=True):
        assert isinstance(choice, Choice)
        row = server.model.logprobs(ids)
        tails = [encoder.continuation("Answer:", text)[0] for text in (" A", " B", " C")]
        np.testing.assert_allclose(choice.logprobs, row[tails], atol=1e-5)
    for ids, score in zip(encoder.encode(prompts), made.score(prompts, [" yes"] * 5), strict=True):
        assert isinstance(score, ResponseScore)
        tail = encoder.continuation("Answer:", " yes")
        rows = [server.model.logprobs([*ids, *tail[:i]]) for i in range(len(tail))]
        own = [row[token] for row, token in zip(rows, tail, strict=True)]
        assert score.tokens == len(tail)
        assert score.nll == pytest.approx(-np.mean(own), abs=1e-5)
        ranks = [(row > value).sum() for row, value in zip(rows, own, strict=True)]
        assert score.rank == pytest.approx(np.mean(ranks))
        gaps = [np.diff(np.sort(row)[-2:])[0] for row in rows]
        assert score.margin == pytest.approx(np.mean(gaps), abs=1e-5)


def window(made: Engine) -> int:
    return int(made.encoder.window)  # type: ignore[attr-defined]


def test_an_adapter_has_the_window_of_the_model_it_is_on(
    server: FaultyServer, tiny_model: Path
) -> None:
    adapter = {"id": "hash-model", "root": "/adapters/a", "parent": "base", "max_model_len": None}
    listed = [{"id": "base", "max_model_len": 777}, adapter]
    server.models = lambda: {"data": listed}
    named = dataclasses.replace(config(server, tiny_model), model="hash-model")
    assert window(connect(named, client(server))) == 777
    for strange in ("hash-model", "elsewhere", None):
        adapter["parent"] = strange
        assert window(connect(named, client(server))) not in (0, 777)


@pytest.mark.parametrize(
    ("status", "listed", "why"),
    [
        ("500 Internal", {"error": "no database"}, "HTTP 500: no database"),
        ("404 Not Found", {"detail": "Not Found"}, "HTTP 404: Not Found"),
        ("200 OK", [{"id": "hash-model"}], "unusable reply"),
    ],
)
def test_a_server_that_does_not_list_its_models(
    server: FaultyServer, tiny_model: Path, status: str, listed: object, why: str
) -> None:
    server.models_status, server.models = status, lambda: listed
    named = dataclasses.replace(config(server, tiny_model), model="hash-model")
    made = connect(named, client(server))
    assert made.abilities.choose
    assert f"its models are not listed ({why}" in "; ".join(made.abilities.found)
    with pytest.raises(UserError, match=f"--model: {why}"):
        connect(config(server, tiny_model), client(server))


def test_the_list_of_models_is_waited_for(server: FaultyServer, tiny_model: Path) -> None:
    listed, statuses = server.models(), itertools.repeat("503 Service Unavailable", 4)

    def models() -> object:
        server.models_status = next(statuses, "200 OK")
        return listed

    server.models = models
    assert window(engine(server, tiny_model, retries=4, longest_wait=5.0)) == 2048


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\nrobustft: done", "\u202ea", "", "b" * 10**4])
def test_a_model_whose_name_would_deceive_a_reader_is_not_taken(
    server: FaultyServer, name: str
) -> None:
    server.completions = False
    server.model_id = name
    with pytest.raises(UserError, match=r"unusable reply: data\.0\.id: .* printable") as caught:
        connect(config(server, None), client(server))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("known", [512, 10**30])  # by the tokenizer; the second stands for none
def test_a_window_that_the_server_does_not_tell(
    server: FaultyServer, tiny_model: Path, tmp_path: Path, known: int
) -> None:
    assert "window" not in "; ".join(engine(server, tiny_model).abilities.found)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": known}))
    for untold in (None, 0, -1):
        server.models = lambda: {"data": [{"id": "hash-model", "max_model_len": untold}]}  # noqa: B023
        made = engine(server, model)
        told = "; ".join(made.abilities.found)
        if known == 512:
            assert "no window is told: 512 tokens, as the tokenizer says" in told
            assert window(made) == 512
        else:
            assert "no window is told: nothing is cut" in told
            assert window(made) > 10**6


def test_a_chat_only_server_still_answers(server: FaultyServer) -> None:
    made = engine(server, None)
    assert made.abilities.choose
    assert made.abilities.nll
    assert not made.abilities.score
    prompts, candidates = questions(4)
    assert all(isinstance(said, Generation) for said in made.generate(prompts, 3))
    chosen = made.choose(prompts, candidates)
    assert all(isinstance(choice, Choice) for choice in chosen)


def test_a_sampled_token_need_not_be_among_the_likeliest(server: FaultyServer) -> None:
    server.completions = False
    warm = dataclasses.replace(config(server, None), temperature=0.7)
    made = connect(warm, client(server, retries=0))
    said = made.generate(questions(4)[0], 3, seeds=range(4))
    assert all(isinstance(one, Generation) and len(one.nll) == 3 for one in said)

    def misstate(body: dict[str, Any], reply: dict[str, Any]) -> None:
        for token in reply["choices"][0]["logprobs"]["content"]:
            token["top_logprobs"] = [{"token": token["token"], "logprob": token["logprob"] - 1}]

    server.edit = misstate
    (failure,) = made.generate(questions(1)[0], 3, seeds=[0])
    assert isinstance(failure, Failure)
    assert "belong to their tokens" in failure.reason


HALF = "\ufffd"  # how a token is spelt that holds a part of a character


@pytest.mark.parametrize(
    ("pieces", "text", "offsets"),
    [
        (["Caf", HALF, HALF, " is", " B"], "Café is B", (0, 3, 3, 4, 7, 9)),
        ([HALF, HALF, HALF, "B"], "答B", (0, 0, 0, 1, 2)),
        (["B", " " + HALF, HALF, HALF, "</s>"], "B 🙂", (0, 1, 1, 1, 3)),
        ([HALF] * 6 + ["。", ""], "答案。", (0, 0, 0, 0, 0, 0, 2, 3)),
        (["\\xe7\\xad", "\\x94", " B"], "答 B", (0, 0, 1, 3)),  # otherwise spelt
        (["B", "\\xe7\\xad", "\\x94"], "B答", (0, 1, 1, 2)),
        (["é", HALF, HALF, "é", " B"], "éèé B", (0, 1, 1, 2, 3, 5)),
        ([HALF, HALF, "é", " B"], "éé B", (0, 0, 0, 1, 4)),  # which of them is split is not told
        (["The", "answer", "is", "B"], "The answer is B", (0, 3, 10, 13, 15)),  # spaces left out
        (["B"], " B", (0, 2)),
        ([" B", "</s>"], " B", (0, 2)),
        ([" B", ""], " B", (0, 2)),
        ([" B"], "B", (0, 1)),
        ([HALF, " B"], HALF + " B", (0, 1, 3)),
        ([" B", HALF], " B", (0, 2)),  # cut off within a character
        (["</s>"], "", (0,)),
        ([], "B", (0,)),
    ],
)
def test_tokens_are_found_in_the_text(
    pieces: list[str], text: str, offsets: tuple[int, ...]
) -> None:
    assert piece_offsets(pieces, text) == offsets


def test_a_split_character_loses_no_token(server: FaultyServer) -> None:
    pieces = ["Caf", HALF, HALF, " is", " " + HALF, HALF, HALF, "</s>"]

    def accents(body: dict[str, Any], reply: dict[str, Any]) -> None:
        choice = reply["choices"][0]
        choice["message"]["content"] = "Café is 答"
        reply["usage"]["completion_tokens"] = len(pieces)
        choice["logprobs"] = {
            "content": [
                {"token": piece, "logprob": value}
                for piece, value in zip(pieces, range(-8, 0), strict=True)
            ]
        }

    made = engine(server, None)
    server.edit = accents
    (said,) = made.generate(questions(1)[0], 8)
    assert isinstance(said, Generation)
    assert said.nll.tolist() == [8, 7, 6, 5, 4, 3, 2]
    assert said.span_mean(said.nll, 3, 4) == 6.5  # "é" is two tokens
    assert said.span_mean(said.nll, 8, 9) == 3
    assert said.span_mean(said.nll, 4, 7) == 5


@pytest.mark.parametrize(
    ("edit", "lost"),
    [
        (lambda c: c.update(logprobs=None, prompt_logprobs=None), ("choose", "score", "nll")),
        (lambda c: c.update(prompt_logprobs=None), ()),  # echo is left
    ],
)
def test_what_a_server_does_not_give_is_no_ability(
    server: FaultyServer, tiny_model: Path, edit: object, lost: tuple[str, ...]
) -> None:
    server.edit = lambda body, reply: edit(reply["choices"][0])  # type: ignore[operator]
    made = engine(server, tiny_model)
    for name in ("choose", "score", "nll"):
        assert getattr(made.abilities, name) == (name not in lost), made.abilities.found


@pytest.mark.parametrize("chat", [True, False])
def test_why_log_probabilities_are_not_used_is_told(
    server: FaultyServer, tiny_model: Path, chat: bool
) -> None:
    server.fault = "bad_request"
    server.unavailable = lambda body: "logprobs" in body
    told = "; ".join(engine(server, None if chat else tiny_model).abilities.found)
    assert "no log-probabilities (HTTP 400: context length exceeded" in told
    server.fault = None
    server.edit = lambda body, reply: reply["choices"][0].update(logprobs=None)
    told = "; ".join(engine(server, None if chat else tiny_model).abilities.found)
    assert told.endswith("no log-probabilities")


def test_a_chat_server_need_not_tell_the_likeliest_tokens(server: FaultyServer) -> None:
    def hide(body: dict[str, Any], reply: dict[str, Any]) -> None:
        for token in reply["choices"][0].get("logprobs", {}).get("content", ()):
            token["top_logprobs"] = None

    server.edit = hide
    made = engine(server, None)
    assert made.abilities.nll
    assert not made.abilities.choose
    for said in made.generate(questions(4)[0], 3):
        assert isinstance(said, Generation)
        assert np.isfinite(said.nll).all()


@pytest.mark.parametrize("spelling", ["", " A"])
def test_tokens_may_share_a_spelling(server: FaultyServer, spelling: str) -> None:
    made = engine(server, None)
    ranked = [(spelling, -0.1), (" A", -3.0), (" B", -4.0), (spelling, -9.0)]
    top = [{"token": token, "logprob": logprob} for token, logprob in ranked]

    def share(body: dict[str, Any], reply: dict[str, Any]) -> None:
        choice = reply["choices"][0]
        choice["message"]["content"] = spelling
        choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}

    server.edit = share
    (choice,) = made.choose(questions(1)[0], [(" A", " B")])
    assert isinstance(choice, Choice)
    np.testing.assert_allclose(choice.logprobs, [-0.1 if spelling else -3.0, -4.0])


@pytest.mark.parametrize(("name", "content"), [("reasoning", None), ("reasoning_content", "")])
def test_a_model_that_thinks_is_told_not_to(
    server: FaultyServer, name: str, content: str | None
) -> None:
    def think(body: dict[str, Any], reply: dict[str, Any]) -> None:
        if body.get("chat_template_kwargs") != {"enable_thinking": False}:
            reply["choices"][0]["message"] = {"content": content, name: "Okay, the user"}

    server.edit = think
    made = engine(server, None)
    assert "the model thinks before it answers" in "; ".join(made.abilities.found)
    said = [*made.generate(questions(4)[0], 3), *made.choose(*questions(4))]
    assert not any(isinstance(one, Failure) for one in said)
    assert all(one.text for one in said if isinstance(one, Generation))
    made.extras = {}  # type: ignore[attr-defined]
    assert made.choose(*questions(1)) == [Failure("the model thinks before it answers")]
    assert made.generate(questions(1)[0], 3) == [Failure("the model thinks before it answers")]


@pytest.mark.parametrize("known", [True, False])
def test_a_model_that_always_thinks_is_refused(server: FaultyServer, known: bool) -> None:
    def think(body: dict[str, Any], reply: dict[str, Any]) -> None:
        reply["choices"][0]["message"] = {"content": None, "reasoning": "Okay, the user"}
        if "chat_template_kwargs" in body and not known:
            del reply["choices"]

    server.edit = think
    with pytest.raises(UserError, match=r"the model thinks before it answers, and .* not stop it"):
        engine(server, None)


@pytest.mark.parametrize(
    "content", ["<think>\nOkay, the user", "\n<think>\n\n</think>\n\n4", "Okay.\n</think>\n\n4"]
)
def test_thoughts_in_the_text_of_a_reply_are_no_answer(server: FaultyServer, content: str) -> None:
    def think(body: dict[str, Any], reply: dict[str, Any]) -> None:
        if body.get("chat_template_kwargs") != {"enable_thinking": False}:
            reply["choices"][0] |= {"message": {"content": content}, "logprobs": None}

    server.edit = think
    made = engine(server, None)
    assert "the model thinks before it answers" in "; ".join(made.abilities.found)
    said = [*made.generate(questions(4)[0], 3), *made.choose(*questions(4))]
    assert not any(isinstance(one, Failure) for one in said)
    made.extras = {}  # type: ignore[attr-defined]
    assert made.generate(questions(1)[0], 3) == [Failure("the model thinks before it answers")]


def test_thoughts_that_a_text_speaks_of_are_a_part_of_it(server: FaultyServer) -> None:
    made = engine(server, None)
    text = "Put it between <think> and </think>."
    server.edit = lambda body, reply: reply.update(
        usage=None,
        choices=[
            {
                "message": {"content": text},
                "logprobs": {"content": [{"token": text, "logprob": -1.0}]},
            }
        ],
    )
    (said,) = made.generate(questions(1)[0], 3)
    assert isinstance(said, Generation)
    assert said.text == text


def test_scores_of_the_tokens_next_door_are_found_out(
    server: FaultyServer, tiny_model: Path
) -> None:
    def shift(body: dict[str, object], reply: dict[str, list[dict[str, object]]]) -> None:
        choice = reply["choices"][0]
        choice["prompt_logprobs"] = None
        if body.get("echo"):
            given = choice["logprobs"]
            assert isinstance(given, dict)
            for name in ("token_logprobs", "top_logprobs"):
                given[name] = [*given[name][1:], given[name][-1]]

    server.edit = shift  # type: ignore[assignment]
    made = engine(server, tiny_model)
    assert not made.abilities.score
    assert "as of other tokens" in made.abilities.found[-2] + made.abilities.found[-1]
    assert made.abilities.nll


def test_an_echoed_token_that_is_no_text_of_its_own_shares_its_spelling() -> None:
    def echo(pieces: list[str], likeliest: dict[str, float]) -> bytes:
        values = [None, -3.0, -1.0]
        given = {
            "tokens": pieces, "token_logprobs": values, "top_logprobs": [None, likeliest, None],
        }  # fmt: skip
        return json.dumps({"choices": [{"text": "", "logprobs": given}]}).encode()

    for spelling in (HALF, ""):  # of another token, the likeliest, and of the one given
        found = read_echo(echo(["A", spelling, " B"], {spelling: -0.1, " C": -4.0}), [0], [1, 2])
        assert found.logprobs.tolist() == [-3.0, -1.0]
    with pytest.raises(ValueError, match="belong to their tokens"):
        read_echo(echo(["A", " D", " B"], {" D": -0.1, " C": -4.0}), [0], [1, 2])


@pytest.mark.parametrize(
    ("value", "likeliest", "margin"),
    [
        (-0.7, {" A": -0.7, " B": -0.7}, 0.0),  # as rounded logits often are
        (-3.0, {" C": -0.7, " B": -0.7}, 0.0),
        (-3.0, {" C": -0.7, " B": -0.7, " A": -3.0}, 0.0),
        (-0.7, {" A": -0.701, " B": -2.701}, 2.0),  # stated twice, rounded
        (-0.7, {HALF: -0.7, " B": -2.7}, 2.0),
        (-2.0, {" B": -0.5}, 1.5),
        (-2.0, {" A": -2.0}, math.nan),
    ],
)
def test_the_margin_of_an_echoed_token(
    value: float, likeliest: dict[str, float], margin: float
) -> None:
    piece = HALF if HALF in likeliest else " A"
    given = {
        "tokens": ["Q", piece], "token_logprobs": [None, value], "top_logprobs": [None, likeliest],
    }  # fmt: skip
    payload = json.dumps({"choices": [{"text": "", "logprobs": given}]}).encode()
    found = read_echo(payload, [0], [1])
    np.testing.assert_allclose(found.best - found.second, [margin], atol=0.01)


def test_requests_in_flight_are_bounded(server: FaultyServer, tiny_model: Path) -> None:
    made = engine(server, tiny_model)
    server.edit = lambda body, reply: time.sleep(0.05)
    made.choose(*questions(20))
    assert 1 < server.most_at_once <= 16


def test_a_server_gets_as_many_requests_as_it_takes(
    server: FaultyServer, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = engine(server, tiny_model, longest_wait=10.0)
    server.fault = "too_many_requests"
    server.strikes = lambda digest, tries: digest % 3 == 0 and tries < 9
    replies = made.choose(*questions(100))
    assert not [one for one in replies if isinstance(one, Failure)]
    assert [r.getMessage().split(": ", 1)[1] for r in caplog.records] == [
        "refuses some requests as too many at a time; it gets as many as it takes"
    ]


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_that_is_busy_at_first_is_not_taken_for_a_lesser_one(
    server: FaultyServer, tiny_model: Path, chat: bool
) -> None:
    calm = engine(server, None if chat else tiny_model).abilities
    requests = itertools.count(1)
    server.fault = "too_many_requests"
    server.strikes = lambda digest, tries: next(requests) % 4 != 0
    assert engine(server, None if chat else tiny_model, longest_wait=10.0).abilities == calm


def test_a_server_that_takes_no_request_is_not_asked_for_ever(
    server: FaultyServer, tiny_model: Path
) -> None:
    made = engine(server, tiny_model)
    server.fault, server.strikes = "too_many_requests", lambda digest, tries: True
    with pytest.raises(EngineLost, match=r": HTTP 429: slow down, and nothing else for 0\.1 s$"):
        engine(server, tiny_model)
    replies = made.choose(*questions(20))
    assert {str(one.reason) for one in replies if isinstance(one, Failure)} == {
        "HTTP 429: slow down (and nothing else for 0.1 s)"
    }
    assert len(replies) == 20


def test_how_many_texts_it_takes_is_not_learnt_from_letters(server: FaultyServer) -> None:
    """A server that works on few at a time answers letters at once all the same."""
    made = JsonClient(server.url, concurrency=64)
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "temperature": 0}
    letters, texts = ([body | {"max_tokens": most, "n": n} for n in range(100)] for most in (1, 9))
    go_on = threading.Event()

    def wait(asked: dict[str, Any], reply: dict[str, Any]) -> None:
        if asked["max_tokens"] > 1:
            go_on.wait(60)

    server.edit = wait
    assert made.ask_all("/chat/completions", letters, [len] * 100)
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(made.ask_all, "/chat/completions", texts, [len] * 100)
        while server.at_once < 16:
            time.sleep(0.01)
        time.sleep(0.2)
        assert server.at_once == 16
        go_on.set()
        assert len(said.result(60)) == 100


def test_cancel_ends_what_another_thread_waits_for(server: FaultyServer, tiny_model: Path) -> None:
    made = engine(server, tiny_model)
    go_on, asked = threading.Event(), threading.Event()

    def wait(body: dict[str, Any], reply: dict[str, Any]) -> None:
        asked.set()
        go_on.wait(60)

    server.edit = wait
    prompts, candidates = questions(3)
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(made.choose, prompts, candidates)
        assert asked.wait(60)
        made.cancel()  # type: ignore[attr-defined]
        with pytest.raises(CancelledError):
            said.result(60)
    go_on.set()
    assert made.choose(prompts, candidates)  # and goes on from there


@pytest.mark.parametrize("closed", [True, False])
def test_a_client_leaves_no_thread_and_no_connection(server: FaultyServer, closed: bool) -> None:
    made = client(server)
    made.ask("/models", None, bytes)
    thread = made._connection._thread
    assert server.open == 1
    if closed:
        made.close()
        made.close()
    del made
    patience = time.monotonic() + 10
    while (thread.is_alive() or server.open) and time.monotonic() < patience:
        gc.collect()  # again and again: the thread itself may hold the last request for a moment
        time.sleep(0.01)
    assert not thread.is_alive()
    assert server.open == 0


def test_a_client_dropped_by_a_slow_thread_leaves_no_thread(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = asyncio.run_coroutine_threadsafe

    def slow(work: Any, loop: asyncio.AbstractEventLoop) -> Any:
        future = submit(work, loop)
        future.result()  # the thread that drops the client gets its turn when all is closed
        time.sleep(0.05)  # and the loop waits for events again
        return future

    made = client(server)
    made.ask("/models", None, bytes)
    thread = made._connection._thread
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", slow)
    del made
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_connection_that_cannot_be_closed_leaves_no_other_open() -> None:
    closed = []

    class Client:
        async def aclose(self) -> None:
            if not closed:
                closed.append("")
                raise OSError("broken pipe")
            closed.append("closed")

    made: Any = [Client() for _ in range(3)]
    asyncio.run(connection._close(made))
    assert closed == ["", "closed", "closed"]


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("mode", ["prompt_logprobs", "echo", "chat"])
@pytest.mark.parametrize("size", SIZES)
def test_no_fault_makes_a_wrong_answer(
    server: FaultyServer, healthy: Healthy, tiny_model: Path, kind: str, mode: str, size: Size,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    tokenizer = None if mode == "chat" else tiny_model
    if mode == "echo":
        server.edit = lambda body, reply: reply["choices"][0].pop("prompt_logprobs", None)
    prompts, candidates = questions(size.requests)
    made = engine(server, tokenizer, timeout=PATIENCE.get(kind, 30))
    truth = healthy.choices(mode, size.requests)
    server.tries.clear()
    server.fault = kind
    server.strikes = size.struck
    started = time.monotonic()
    found = made.choose(prompts, candidates)
    assert time.monotonic() - started < 120  # far from any wait that the server asks for
    assert len(found) == size.requests
    failures = [said.reason for said in found if isinstance(said, Failure)]
    assert bool(failures) == ((mode, kind) not in HARMLESS)
    # On a machine too busy to answer in time, every request may be too late.
    assert len(failures) < size.requests or kind in PATIENCE
    for right, said in zip(truth, found, strict=True):
        if not isinstance(said, Failure):
            assert isinstance(right, Choice)
            np.testing.assert_array_equal(said.logprobs, right.logprobs)
    told = "\n".join([*failures, caplog.text])
    assert KEY not in told
    assert "\x1b" not in told
    assert all("\n" not in reason and len(reason) < 400 for reason in failures)


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("size", SIZES)
def test_a_run_through_faults_loses_nothing_and_resuming_completes_it(
    server: FaultyServer, healthy: Healthy, tiny_model: Path, tmp_path: Path, kind: str,
    size: Size,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = write(tmp_path / "in.jsonl", quiz(size.records))
    hasty = engine(server, tiny_model, timeout=PATIENCE.get(kind, 30))
    patient = engine(server, tiny_model) if kind in PATIENCE else hasty
    whole = healthy.verdicts(size.records)
    truth = [json.loads(line) for line in whole.splitlines()]
    server.tries.clear()
    server.fault = kind
    server.strikes = size.struck
    clean(source, tmp_path / "out", hasty)
    # Fewer than all are sent: what follows from a request given up is not asked.
    assert len(server.tries) >= size.requests
    lines = read(tmp_path / "out/verdicts.jsonl")
    assert [line["id"] for line in lines] == [line["id"] for line in truth]
    unjudged = 0
    for right, line in zip(truth, lines, strict=True):
        if line["reason"].startswith("not judged"):
            unjudged += 1
        else:
            assert line["verdict"] == right["verdict"]
            assert line["noise_score"] == right["noise_score"]
    assert unjudged > 0
    server.fault = None
    clean(source, tmp_path / "out", patient)
    assert (tmp_path / "out/verdicts.jsonl").read_bytes() == whole
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(capsys.readouterr())


@pytest.mark.parametrize("chat", [True, False])
def test_a_reply_of_more_than_was_asked_for_is_unusable(
    server: FaultyServer, tiny_model: Path, chat: bool
) -> None:
    made = engine(server, None if chat else tiny_model, retries=0)

    def add(body: dict[str, Any], reply: dict[str, Any]) -> None:
        reply["choices"].insert(0, reply["choices"][0] | {"index": 1})

    server.edit = add
    (said,) = made.generate(questions(1)[0], 3)
    assert isinstance(said, Failure)
    assert "unusable reply: choices: " in said.reason


@pytest.mark.parametrize("error", [IndexError, KeyError, OverflowError, RecursionError, ValueError])
def test_a_reply_that_cannot_be_read_costs_one_request(
    server: FaultyServer, error: type[Exception]
) -> None:
    def read(payload: bytes) -> bytes:
        if b"Question 1?" in payload:
            raise error("out of range")
        return payload

    server.edit = lambda body, reply: reply.update(asked=body["messages"][0]["content"])
    bodies = [
        {"messages": [{"role": "user", "content": f"Question {i}?"}], "max_tokens": 1}
        for i in range(3)
    ]
    found = client(server, retries=0).ask_all("/chat/completions", bodies, [read] * 3)
    assert [isinstance(one, Failure) for one in found] == [False, True, False]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", ["connection_reset", "internal_error", "truncated_json"])
def test_what_a_server_can_do_is_asked_again_where_the_connection_breaks(
    server: FaultyServer, tiny_model: Path, chat: bool, kind: str
) -> None:
    tokenizer = None if chat else tiny_model
    able = engine(server, tokenizer).abilities
    server.tries.clear()
    server.fault = kind
    server.strikes = lambda digest, tries: tries == 0
    assert engine(server, tokenizer).abilities == able
    assert able.choose


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", ["connection_reset", "bad_gateway"])
@pytest.mark.parametrize("before", [0, 1])  # requests before it is away
@pytest.mark.parametrize("lost", [5, 8])
def test_a_server_that_is_away_for_a_moment_at_the_start_is_waited_for(
    server: FaultyServer, tiny_model: Path, chat: bool, kind: str, before: int, lost: int
) -> None:
    tokenizer = None if chat else tiny_model
    able = engine(server, tokenizer).abilities
    server.requests = 0
    server.fault = kind
    server.strikes = lambda digest, tries: before < server.requests <= before + lost
    # Eight are more than the tries: what it can do is then asked for again once it is back.
    assert engine(server, tokenizer, retries=5, longest_wait=5.0).abilities == able


@pytest.mark.parametrize("kind", ["connection_reset", "bad_gateway"])
def test_requests_of_a_kind_that_are_always_answered_as_by_a_server_that_is_away(
    server: FaultyServer, tiny_model: Path, kind: str
) -> None:
    server.fault = kind
    server.unavailable = lambda body: "prompt_logprobs" in body or "echo" in body
    made = engine(server, tiny_model, retries=5, longest_wait=5.0)
    assert made.abilities.nll
    assert made.abilities.choose
    assert not made.abilities.score
    # The one patience, then two tries: of echo, and of both when all is asked again.
    assert server.struck == 6 + 2 + 2 + 2
    server.unavailable = lambda body: "logprobs" in body
    server.struck = 0
    assert not engine(server, tiny_model, retries=5, longest_wait=5.0).abilities.nll
    assert server.struck == 6 + 2 + 2 + 3 * 2


def test_a_server_that_is_away_when_the_run_starts_is_not_waited_for_for_ever(
    server: FaultyServer, tiny_model: Path
) -> None:
    server.fault, server.strikes = "bad_gateway", lambda digest, tries: True
    with pytest.raises(UserError, match="the server cannot be used: HTTP 502"):
        engine(server, tiny_model, retries=5, longest_wait=5.0)
    assert server.requests == 6 + 6 * 2 + 6 * 2  # forms of /completions and of /chat/completions


def test_a_client_asks_again_after_its_server_was_lost(server: FaultyServer) -> None:
    made = engine(server, None, retries=0)
    server.fault, server.strikes = "connection_reset", lambda digest, tries: True
    made.choose(*questions(70))
    with pytest.raises(EngineLost, match="the last 70 requests failed"):
        made.choose(*questions(1))
    server.fault = None
    assert isinstance(made.choose(*questions(1))[0], Choice)


def test_who_comes_later_does_not_inherit_a_lost_server(server: FaultyServer) -> None:
    made = engine(server, None, retries=0)
    server.fault, server.strikes = "connection_reset", lambda digest, tries: True
    assert all(isinstance(said, Failure) for said in made.choose(*questions(70)))  # a run's last
    server.fault = None
    before = server.requests
    assert all(isinstance(said, Choice) for said in made.choose(*questions(3)))
    assert server.requests == before + 3


@pytest.mark.parametrize(
    ("status", "reply"),
    [
        ("200 OK", {"error": {"message": "no such model"}}),
        ("200 OK", {"error": "no such model"}),
        ("200 OK", {"object": "error", "message": "no such model", "code": 404}),
        ("422 Unprocessable", {"detail": [{"loc": ["body", "n"], "msg": "no such model"}]}),
        ("422 Unprocessable", {"detail": {"error": "no such model"}}),
        ("400 Bad Request", {"error": {"message": ["no such model"]}}),
    ],
)
def test_what_a_server_says_of_an_error_is_told(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, status: str, reply: object
) -> None:
    def say(connection: socket.socket, honest: dict[str, Any], key: str) -> None:
        send_json(connection, reply, status)

    made = engine(server, None, retries=0)
    monkeypatch.setitem(FAULTS, "say", say)
    server.fault, server.strikes = "say", lambda digest, tries: True
    (failure,) = made.choose(*questions(1))
    assert isinstance(failure, Failure)
    assert ": no such model" in failure.reason


def test_a_server_that_is_gone_ends_the_run_and_keeps_its_answers(
    server: FaultyServer, tiny_model: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", quiz(80))
    made = engine(server, tiny_model, retries=1)
    clean(source, tmp_path / "whole", made)
    server.fault = "connection_reset"
    server.strikes = lambda digest, tries: server.requests > answered + 150
    answered = server.requests
    with pytest.raises(EngineLost, match=r"the last \d+ requests failed"):
        clean(source, tmp_path / "out", engine(server, tiny_model, retries=1))
    server.fault = None
    before = server.requests
    clean(source, tmp_path / "out", made)
    assert server.requests - before < answered
    whole = (tmp_path / "whole/verdicts.jsonl").read_bytes()
    assert (tmp_path / "out/verdicts.jsonl").read_bytes() == whole


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_that_refuses_long_prompts_is_not_lost(
    server: FaultyServer, tiny_model: Path, chat: bool
) -> None:
    made = engine(server, None if chat else tiny_model)
    server.fault = "bad_request"
    server.longest = 300
    prompts = [Prompt((Message("user", f"Question {i}? " + "so " * 99),), "A:") for i in range(70)]
    for _ in range(2):
        for said in made.choose(prompts, [(" A", " B", " C")] * 70):
            assert isinstance(said, Failure)
            assert said.reason.startswith("HTTP 400")
    # The first requests after that break down, which is no refusal; they are sent again.
    before = server.requests
    server.fault = "connection_reset"
    server.strikes = lambda digest, tries: server.requests <= before + 6
    assert isinstance(made.choose(*questions(1))[0], Choice)
    server.fault = None
    assert isinstance(made.choose(*questions(1))[0], Choice)


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_that_refuses_everything_is_lost(
    server: FaultyServer, tiny_model: Path, chat: bool
) -> None:
    made = engine(server, None if chat else tiny_model)
    server.fault = "bad_request"
    server.strikes = lambda digest, tries: True
    assert all(isinstance(said, Failure) for said in made.choose(*questions(70)))
    before = server.requests
    with pytest.raises(EngineLost, match="last 70 requests were refused, and so is a short one"):
        made.choose(*questions(70))
    assert server.requests == before + 1


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_whose_likeliest_tokens_are_no_answer_is_not_lost(
    server: FaultyServer, tiny_model: Path, chat: bool
) -> None:
    def score_nothing(body: dict[str, Any], reply: dict[str, Any]) -> None:
        if body.get("echo") or body.get("prompt_logprobs"):
            reply["choices"][0] |= {"logprobs": None, "prompt_logprobs": None}

    server.edit = score_nothing
    made = engine(server, None if chat else tiny_model)
    assert made.abilities.choose
    assert not made.abilities.score
    prompts, _ = questions(70)
    for _ in range(2):
        for said in made.choose(prompts, [(" Oui", " Non")] * 70):
            assert said == Failure("none of Oui, Non is among the likeliest tokens")
    (choice,) = made.choose(*questions(1))
    assert isinstance(choice, Choice)


@pytest.mark.parametrize("chat", [True, False])
def test_a_filtered_reply_is_no_answer_and_is_not_asked_for_again(
    server: FaultyServer, tiny_model: Path, chat: bool
) -> None:
    made = engine(server, None if chat else tiny_model)
    server.edit = lambda body, reply: reply["choices"][0].update(
        finish_reason="content_filter", message={"content": None}, text="", logprobs=None
    )
    before = server.requests
    prompts, candidates = questions(70)
    for said in [*made.choose(prompts, candidates), *made.generate(prompts, 3)]:
        assert said == Failure("the server's content filter held the reply back")
    assert server.requests == before + 140


# --- what the user got wrong ---------------------------------------------------------------------


def test_nothing_answers_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+/v1: no server answers there"):
        load_engine(EngineConfig(engine="openai", base_url=address, timeout=5))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("localhost:8000/v1", "expected an http or https address"),
        ("ftp://host/v1", "expected an http or https address"),
        ("http://user:hunter2@host/v1", "without user name, password"),
        ("http://host/v1?key=hunter2", "without user name, password"),
        ("http://[bad/v1", "expected an"),
    ],
)
def test_a_bad_address(address: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        load_engine(EngineConfig(engine="openai", base_url=address))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "ftp://user:hunter2@host"),
        ("ALL_PROXY", "socks5://user:hunter2@host"),
        ("SSL_CERT_FILE", "/nowhere/certificates.pem"),
    ],
)
def test_an_environment_that_cannot_be_used(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    if value.startswith("socks") and importlib.util.find_spec("socksio"):
        pytest.skip("socksio is installed")
    monkeypatch.setenv(variable, value)
    threads = threading.active_count()
    with pytest.raises(UserError, match="that the environment names cannot be used: ") as caught:
        client(server)
    assert "hunter2" not in str(caught.value)
    patience = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < patience:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_a_key_given_as_the_name_of_its_variable_is_not_repeated(server: FaultyServer) -> None:
    with pytest.raises(UserError, match="--key-variable") as caught:
        load_engine(EngineConfig(engine="openai", base_url=server.url, key_variable=KEY))
    assert KEY not in str(caught.value)


def test_a_key_with_a_line_break_is_not_repeated(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "hunter2\r\nx-injected: 1")
    with pytest.raises(UserError, match=r"\$MY_KEY") as caught:
        load_engine(EngineConfig(engine="openai", base_url=server.url, key_variable="MY_KEY"))
    assert "hunter2" not in str(caught.value)


def test_a_refused_key_names_the_variable(server: FaultyServer, tiny_model: Path) -> None:
    server.fault = "key_revoked"
    server.strikes = lambda digest, tries: True
    with pytest.raises(UserError, match="401") as caught:
        engine(server, tiny_model)
    assert KEY not in str(caught.value)
