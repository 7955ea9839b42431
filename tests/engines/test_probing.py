"""What an OpenAI-compatible server can do is found out, used and told."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tenacity", reason="needs the server extra: pip install 'robustft[server]'")
from faulty_server import FaultyServer
from served import KEY, client, config, engine, questions

from robustft.config import EngineConfig
from robustft.engines import Choice, Engine, Failure, Generation, ResponseScore
from robustft.engines.factory import load_engine
from robustft.engines.probing import connect
from robustft.errors import UserError

# The server's own threads must not fail: a fault that never left it would pass for one withstood.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


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


def test_nothing_answers_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+/v1: no server answers there"):
        load_engine(EngineConfig(engine="openai", base_url=address, timeout=5))


def test_a_refused_key_names_the_variable(server: FaultyServer, tiny_model: Path) -> None:
    server.fault = "key_revoked"
    server.strikes = lambda digest, tries: True
    with pytest.raises(UserError, match="401") as caught:
        engine(server, tiny_model)
    assert KEY not in str(caught.value)
