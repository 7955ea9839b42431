"""Lines of an output survive the run that wrote them, whole chunks only, for the same run alone."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commandline import SMALL_MODEL, CommandLine, quiz, read, write

from robustft import resumable
from robustft.errors import UserError
from robustft.resumable import ResumableLines, answer_in_units

CHUNKS = [[b'{"n":%d}\n' % n for n in range(low, low + 3)] for low in range(0, 12, 3)]
WHOLE = b"".join(line for chunk in CHUNKS for line in chunk)


class PowerCutError(Exception):
    """Ends a run in the tests."""


def attempt(path: Path, identity: str = "a", stop: int | None = None) -> int:
    """Write CHUNKS, but break off after `stop` of them; returns how many were taken over."""
    taken = 0
    with contextlib.suppress(PowerCutError), ResumableLines(path, {"who": identity}) as lines:
        for number, chunk in enumerate(CHUNKS):
            if number == stop:
                raise PowerCutError
            if kept := lines.take(number, len(chunk)):
                assert kept == chunk
                taken += 1
            else:
                lines.add(number, chunk)
    return taken


def hidden(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*"))


@pytest.mark.parametrize("stop", range(5))
def test_what_is_written_is_taken_over(tmp_path: Path, stop: int) -> None:
    out = tmp_path / "new" / "out.jsonl"
    attempt(out, stop=stop)
    assert out.exists() == (stop == 4)
    assert len(hidden(out.parent)) == (0 < stop < 4)
    assert attempt(out) == stop % 4
    assert out.read_bytes() == WHOLE
    assert hidden(out.parent) == []


@pytest.mark.parametrize(
    "tail", [b"", b'{"n"', b'{"n":6}\n{"n":7}\n', b"\0" * 40, b'{"n":6}\n\0\0\0\n{"n":8}\n']
)
def test_a_torn_end_is_written_again(tmp_path: Path, tail: bytes) -> None:
    out = tmp_path / "out.jsonl"
    attempt(out, stop=2)
    (partial,) = hidden(tmp_path)
    with partial.open("ab") as file:
        file.write(tail)
    assert attempt(out) == 2
    assert out.read_bytes() == WHOLE


def test_a_chunk_may_be_written_anew(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    attempt(out, stop=3)
    fresh = [b'{"n":"%d"}\n' % n for n in range(3)]
    with contextlib.suppress(PowerCutError), ResumableLines(out, {"who": "a"}) as lines:
        assert lines.take(0, 3) == CHUNKS[0]
        lines.add(0, fresh)
        raise PowerCutError
    with ResumableLines(out, {"who": "a"}) as lines:
        assert [lines.take(number, 3) for number in range(4)] == [fresh, *CHUNKS[1:3], []]
        lines.add(3, CHUNKS[3])
    assert out.read_bytes() == b"".join(fresh) + WHOLE[len(b"".join(CHUNKS[0])) :]
    assert hidden(tmp_path) == []


def test_another_run_takes_nothing_over_and_destroys_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    attempt(out, stop=3)
    assert attempt(out, "b") == 0
    assert out.read_bytes() == WHOLE
    assert attempt(out) == 3


def test_what_was_there_stays_until_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    attempt(out, stop=2)
    assert out.read_text() == "before"
    attempt(out)
    assert out.read_bytes() == WHOLE


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with (
        ResumableLines(out, {"who": "a"}),
        pytest.raises(UserError, match="another run is writing it"),
    ):
        attempt(out)
    assert out.read_bytes() == b""


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out\.jsonl: cannot be written"):
        attempt(tmp_path / "file" / "out.jsonl")


def test_a_full_disk_is_one_line_and_what_was_written_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    attempt(out, stop=2)
    (partial,) = hidden(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (partial.stat().st_size + 5, hard))
    try:
        with pytest.raises(UserError, match=r"out\.jsonl: cannot be written: File too large"):
            attempt(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert attempt(out) == 2
    assert out.read_bytes() == WHOLE


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_a_unit_is_kept_as_soon_as_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    monkeypatch.setattr(resumable, "UNIT_ROWS", 3)
    patience = time.monotonic() + 60
    kept_meanwhile = at_a_time == 1

    def ask(items: Sequence[int]) -> list[int]:
        nonlocal kept_meanwhile
        while items[0] == 0 and not kept_meanwhile and time.monotonic() < patience:
            kept_meanwhile = CHUNKS[-1][0] in hidden(tmp_path)[0].read_bytes()
            time.sleep(0.01)
        return list(items)

    engine: Any = SimpleNamespace(at_a_time=at_a_time, cancel=lambda: None)
    with (
        ResumableLines(tmp_path / "out.jsonl", {}) as lines,
        answer_in_units(
            range(12), engine, lines, ask=ask, write=b'{"n":%d}\n'.__mod__, read=lambda _, __: None
        ) as answered,
    ):
        assert list(answered) == [(n, False) for n in range(12)]
    assert kept_meanwhile
    assert (tmp_path / "out.jsonl").read_bytes() == WHOLE


# --- score and eval, killed ----------------------------------------------------------------------

SLOW = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import robustft.evaluation, robustft.resumable, robustft.scoring
from scripted import ScriptedEngine, slowly
robustft.resumable.UNIT_ROWS = 8
seconds = float(sys.argv.pop(1))
engine = ScriptedEngine(before_batch=slowly(seconds))
robustft.scoring.load_engine = lambda config: engine
robustft.evaluation.load_engine = lambda config, adapter: engine
from robustft.cli import main
status = main()
print(len(engine.asked), "asked")
sys.exit(status)
"""


@pytest.fixture(params=["score", "eval"])
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_command_goes_on(tmp_path: Path, command: str, how: signal.Signals) -> None:
    source = write(tmp_path / "in.jsonl", [*quiz(60), b"{broken", *quiz(3)])

    def start(seconds: float, out: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SLOW, str(seconds), command, str(source), "--out", str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    out = tmp_path / "out.jsonl"
    process = start(0.2, out)
    while not any(path.stat().st_size for path in tmp_path.glob(".out.jsonl.*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    statuses = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
    assert process.returncode == statuses[how]
    if how != signal.SIGKILL:
        assert said.splitlines()[-1].endswith("run the same command again to resume")
    assert not out.exists()

    printed, said = start(0, out).communicate(timeout=60)
    *before, small = [line for line in said.splitlines(True) if "left out" not in line]
    assert small == SMALL_MODEL
    assert before == [f"robustft: {out}: resuming; what was asked before is not asked again\n"]
    *summary, asked = printed.splitlines()
    assert 0 < int(asked.split()[0]) <= 63 - 8
    whole, _ = start(0, tmp_path / "whole.jsonl").communicate(timeout=60)
    assert whole.splitlines()[-1] == "63 asked"
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    kept = [line for line in summary if line.startswith(("63 responses", "mean nll", "macro"))]
    assert kept
    assert set(kept) <= set(whole.splitlines())
    assert list(tmp_path.glob(".*")) == []


def test_a_device_or_a_pipe_is_not_replaced(run: CommandLine, tmp_path: Path, command: str) -> None:
    source = write(tmp_path / "in.jsonl", quiz(3))
    device, pipe = tmp_path / "device.jsonl", tmp_path / "pipe.jsonl"
    device.symlink_to("/dev/null")
    os.mkfifo(pipe)
    for out in (device, pipe):
        assert f"{out}: is there already" in run.refused(command, source, "--out", out)
    assert device.is_char_device()
    assert pipe.is_fifo()


def test_other_settings_start_afresh(run: CommandLine, tmp_path: Path, command: str) -> None:
    source, out = write(tmp_path / "in.jsonl", quiz(5)), tmp_path / "o.jsonl"

    def burn() -> None:
        raise RuntimeError("the accelerator is on fire")

    run.script(before_batch=burn)
    assert "the same command resumes" in run(command, source, "--out", out).err
    run.script()
    done = run(command, source, "--out", out, "--limit", "3")
    assert done.status == 0
    assert "already" not in done.err
    assert len(read(out)) == 3
    again = run(command, source, "--out", out, "--limit", "3").err
    assert f"{out}: there already; everything is asked anew, and it is replaced at the end" in again
