"""What a server's replies say, token by token, and what in them is no answer."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tenacity", reason="needs the server extra: pip install 'robustft[server]'")
from faulty_server import FaultyServer
from served import client, config, engine, questions

from robustft.engines import Choice, Failure, Generation
from robustft.engines.probing import connect
from robustft.engines.tokens import piece_offsets
from robustft.engines.wire import read_echo

# The server's own threads must not fail: a fault that never left it would pass for one withstood.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


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


@pytest.mark.parametrize(
    "content",
    ["<think>\nOkay, the user", "<think></think><think>Hm</think>4", "Okay.\n</think>\n\n4"],
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


@pytest.mark.parametrize("begun", [True, False])
def test_an_empty_thinking_block_is_no_thought(server: FaultyServer, begun: bool) -> None:
    """As models write that are told not to think, where the server's template does not for them."""

    def write(body: dict[str, Any], reply: dict[str, Any]) -> None:
        choice, last = reply["choices"][0], body["messages"][-1]
        if begun and last["role"] == "assistant":
            if last["content"] == "1, 2, 3,":
                choice |= {"message": {"content": " 4"}, "logprobs": None}
            return
        told = "chat_template_kwargs" in body
        block = "<think>\n\n</think>\n\n" if told else "<think>\nOkay"
        choice["message"]["content"] = block + choice["message"]["content"] * told
        if choice.get("logprobs"):
            first = {"token": "<think>", "logprob": 0.0}
            choice["logprobs"]["content"][0] = first | {"top_logprobs": [first]}

    server.edit = write
    made = engine(server, None)
    assert "it still writes an empty thinking block, which is read past" in made.abilities.found
    assert made.abilities.choose == begun  # else the block's first token is the reply's
    for said in made.generate(questions(4)[0], 3):
        assert isinstance(said, Generation)
        assert said.text.startswith("<think>") != begun


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
