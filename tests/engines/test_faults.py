"""A server in every kind of trouble: no wrong answer, and nothing lost."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tenacity", reason="needs the server extra: pip install 'robustft[server]'")
from commandline import quiz, read, write
from faulty_server import FAULTS, FaultyServer
from served import KEY, VOCABULARY, clean, engine, questions

from robustft.engines import Choice, Failure, Message, Prompt
from robustft.errors import EngineLost

# The server's own threads must not fail: a fault that never left it would pass for one withstood.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


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
