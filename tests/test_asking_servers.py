"""`eval` and `score` ask a server about several chunks of records at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tenacity", reason="needs the server extra: pip install 'robustft[server]'")
from commandline import quiz, read, write
from faulty_server import FaultyServer

from robustft import evaluation, resumable, scoring
from robustft.cli import main
from robustft.config import CleanConfig, EngineConfig, EvalConfig
from robustft.engines import Engine
from robustft.engines.http import JsonClient
from robustft.engines.probing import connect
from robustft.errors import EngineLost
from robustft.methods import clean_by, decisions
from robustft.progress import Progress
from robustft.resumable import ResumableLines

UNIT = 8  # records of a chunk, and requests of a batch
RECORDS = 20 * UNIT + 3

Call = Callable[[Path, Engine], str]


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    made = FaultyServer(271)
    yield made
    made.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Open questions, each of them one request, and lines that cannot be read."""
    rows = [{name: row[name] for name in ("id", "question", "answer")} for row in quiz(RECORDS)]
    return write(tmp_path / "in.jsonl", [*rows[:9], b"{broken", *rows[9:], b"{broken"])


@pytest.fixture(params=["score", "eval"])
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def call(command: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the command in this process; what it says, without the time it took."""
    monkeypatch.setattr(resumable, "UNIT_ROWS", UNIT)

    def run(out: Path, engine: Engine) -> str:
        if command == "score":
            summary = scoring.score_file(str(source), out, EngineConfig(), engine=engine)
            summary.seconds, summary.path, summary.resumed = 0.0, Path(), 0
            return str(summary)
        result = evaluation.evaluate(EvalConfig(str(source), out=out), engine=engine)
        result.seconds, result.out = 0.0, None
        return str(result)

    return run


def engine(server: FaultyServer, tiny_model: Path, at_a_time: int) -> Engine:
    config = EngineConfig(engine="openai", base_url=server.url, tokenizer=str(tiny_model))
    client = JsonClient(server.url, concurrency=64, retries=0, backoff=0.005)
    made = connect(config, client)
    made.at_a_time = at_a_time
    return made


def partial(out: Path) -> list[Path]:
    return list(out.parent.glob(f".{out.name}.*"))


def begun(out: Path) -> bool:
    """Whether a run that is at work has kept lines."""
    return any(path.stat().st_size for path in partial(out))


def stored(out: Path) -> int:
    """Records that a run which was broken off has kept the lines of, rejects left out."""
    (path,) = partial(out)
    return sum("id" in line and "failed" not in line for line in read(path))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Sequence[bytes]]]:
    """What is written to outputs from now on, chunk by chunk."""
    found: list[tuple[int, Sequence[bytes]]] = []
    write_them = ResumableLines.add

    def add(self: ResumableLines, chunk: int, lines: Sequence[bytes]) -> None:
        found.append((chunk, lines))
        write_them(self, chunk, lines)

    monkeypatch.setattr(ResumableLines, "add", add)
    return found


def test_the_bytes_are_those_of_one_chunk_at_a_time(
    server: FaultyServer, tiny_model: Path, tmp_path: Path, call: Call,
    added: list[tuple[int, Sequence[bytes]]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shown: list[Progress] = []

    def show(*given: Any, **named: Any) -> Progress:
        shown.append(Progress(*given, **named))
        return shown[-1]

    for module in (evaluation, scoring):
        monkeypatch.setattr(module, "Progress", show)
    alone = tmp_path / "alone.jsonl"
    said = call(alone, engine(server, tiny_model, 1))
    one_by_one = added[:]
    for at_a_time in (2, 40):
        added.clear()
        together = tmp_path / f"{at_a_time}.jsonl"
        assert call(together, engine(server, tiny_model, at_a_time)) == said
        assert together.read_bytes() == alone.read_bytes()
        assert sorted(added) == one_by_one
    assert {one._done for one in shown} == {RECORDS}


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_more_requests_are_in_flight_than_one_batch_holds(
    server: FaultyServer, tiny_model: Path, tmp_path: Path, call: Call, at_a_time: int
) -> None:
    made = engine(server, tiny_model, at_a_time)
    patience = time.monotonic() + 60

    def meet(body: dict[str, Any], reply: dict[str, Any]) -> None:
        while at_a_time > 1 and server.most_at_once <= UNIT and time.monotonic() < patience:
            time.sleep(0.01)

    server.edit = meet
    call(tmp_path / "out.jsonl", made)
    assert (server.most_at_once > UNIT) == (at_a_time > 1)


def test_a_server_that_is_lost_costs_no_line(
    server: FaultyServer, tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    said = call(whole, engine(server, tiny_model, 3))
    made = engine(server, tiny_model, 3)
    server.fault = "connection_reset"
    server.strikes = lambda digest, tries: begun(out)
    with pytest.raises(EngineLost, match=r"the last \d+ requests failed"):
        call(out, made)
    assert not out.exists()
    server.fault = None
    kept = stored(out)
    assert kept > 0
    made = engine(server, tiny_model, 3)
    server.tries.clear()
    assert call(out, made) == said
    assert len(server.tries) == RECORDS - kept
    assert out.read_bytes() == whole.read_bytes()


SMALL_CHUNKS = f"""
import sys
import robustft.resumable
robustft.resumable.UNIT_ROWS = {UNIT}
from robustft.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("command", "how"),
    [
        ("score", signal.SIGKILL),
        ("eval", signal.SIGKILL),
        ("score", signal.SIGINT),
        ("eval", signal.SIGTERM),
    ],
    indirect=["command"],
)
def test_a_killed_command_asks_nothing_twice_that_it_kept(
    server: FaultyServer, tiny_model: Path, tmp_path: Path, source: Path, command: str, call: Call,
    how: signal.Signals,
) -> None:  # fmt: skip
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    made = engine(server, tiny_model, 1)
    probes = len(server.tries)
    call(whole, made)
    options = ["--engine", "openai", "--base-url", server.url, "--tokenizer", str(tiny_model)]
    arguments = [command, str(source), "--out", str(out), *options]
    go_on = threading.Event()

    def stop(body: dict[str, Any], reply: dict[str, Any]) -> None:
        if not go_on.is_set() and begun(out):
            go_on.wait(120)

    server.edit = stop
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_CHUNKS, *arguments], stderr=subprocess.PIPE, text=True
    )
    while not begun(out):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    statuses = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
    assert process.returncode == statuses[how], said
    go_on.set()
    kept = stored(out)
    assert 0 < kept < RECORDS
    server.tries.clear()
    assert main(arguments) == 0
    # Late requests of the killed command may be among them: what it asked last was not kept.
    assert len(server.tries) == probes + RECORDS - kept
    assert out.read_bytes() == whole.read_bytes()
    assert not partial(out)


def test_a_baseline_asks_about_several_chunks_at_a_time(
    server: FaultyServer, tiny_model: Path, tmp_path: Path, source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(decisions, "_CHUNK", UNIT)
    patience = time.monotonic() + 60

    def meet(body: dict[str, Any], reply: dict[str, Any]) -> None:
        while server.most_at_once <= UNIT and time.monotonic() < patience:
            time.sleep(0.01)

    def clean(at_a_time: int) -> list[bytes]:
        out, made = tmp_path / str(at_a_time), engine(server, tiny_model, at_a_time)
        server.edit = meet if at_a_time > 1 else server.edit
        monkeypatch.setattr("robustft.methods.load_engine", lambda config: made)
        clean_by("self-label", CleanConfig(str(source), out))
        return [(out / name).read_bytes() for name in ("cleaned.jsonl", "verdicts.jsonl")]

    alone = clean(1)
    assert server.most_at_once <= UNIT
    assert clean(3) == alone
    assert server.most_at_once > UNIT
