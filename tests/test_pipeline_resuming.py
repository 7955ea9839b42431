"""A run that was broken off goes on: nothing is asked twice, and its time counts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from commandline import write
from runs import all_trust, assert_asked_once, choice_rows, run
from scripted import LetterEmbedder, ScriptedEngine

from robustft import shards
from robustft.cleaning import run_clean
from robustft.config import CleanConfig
from robustft.errors import UserError
from robustft.store import UNIT_ROWS

HERE = Path(__file__).parent


def test_duplicate_questions_are_asked_once(tmp_path: Path) -> None:
    rows = choice_rows(10)
    twice = [*rows, *({**row, "id": row["id"] + "b"} for row in rows)]
    engine = ScriptedEngine(choose=all_trust)
    run(write(tmp_path / "in.jsonl", twice), tmp_path / "out", engine)
    once = ScriptedEngine(choose=all_trust)
    run(write(tmp_path / "in2.jsonl", rows), tmp_path / "out2", once)
    assert len(engine.asked) == len(once.asked)


def test_a_finished_run_asks_nothing_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", choice_rows(40))
    run(source, tmp_path / "out")
    before = (tmp_path / "out/verdicts.jsonl").read_bytes()
    engine = ScriptedEngine()
    run(source, tmp_path / "out", engine)
    assert engine.asked == []
    assert (tmp_path / "out/verdicts.jsonl").read_bytes() == before


def test_a_changed_configuration_or_input_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", choice_rows(5))
    run(source, tmp_path / "out")
    with pytest.raises(UserError, match="-k was 3, now 4"):
        run(source, tmp_path / "out", k=4)
    write(source, choice_rows(6))
    with pytest.raises(UserError, match="the input is not the one that it began with"):
        run(source, tmp_path / "out")


def test_another_share_is_selected_without_asking_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", choice_rows(100))
    run(source, tmp_path / "out", beta=0.25)
    engine = ScriptedEngine()
    more = run(source, tmp_path / "out", engine, beta=0.75)
    assert engine.asked == []
    run(source, tmp_path / "fresh", beta=0.75)
    for name in ("cleaned.jsonl", "verdicts.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    assert more.counts["relabel"] > 0


def test_interrupted_anywhere_the_result_is_the_same(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", choice_rows(60))
    run(source, tmp_path / "whole")
    countdown = random.Random(1)
    for _ in range(200):
        left = countdown.randint(0, 12)

        def tick() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        try:
            run(source, tmp_path / "parts", ScriptedEngine(before_batch=tick))
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "parts/verdicts.jsonl").exists()
    else:
        pytest.fail("never finished")
    for name in ("verdicts.jsonl", "cleaned.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_server_is_asked_about_several_units_at_a_time(tmp_path: Path) -> None:
    """The bytes are those of one at a time."""
    meeting, mine = threading.Barrier(2, timeout=120), threading.local()

    def meet() -> None:  # nobody gets on before two units are at work
        if not hasattr(mine, "met"):
            mine.met = meeting.wait()

    source = write(tmp_path / "in.jsonl", choice_rows(2 * UNIT_ROWS + 60))
    engine = ScriptedEngine(before_batch=meet)
    engine.at_a_time = 2
    run(source, tmp_path / "together", engine)
    assert_asked_once(tmp_path / "together/run.sqlite")
    run(source, tmp_path / "alone")
    for name in ("verdicts.jsonl", "cleaned.jsonl"):
        alone = (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "together" / name).read_bytes() == alone


KILLED = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from runs import run
from scripted import ScriptedEngine, slowly
run(Path(sys.argv[1]), Path(sys.argv[2]), ScriptedEngine(before_batch=slowly(0.02)))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_nothing_is_asked_twice(tmp_path: Path, kills: int) -> None:
    source = write(tmp_path / "in.jsonl", choice_rows(200))
    run(source, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")]
    moments = random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (tmp_path / "out/run.sqlite").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 2.5))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    for name in ("verdicts.jsonl", "cleaned.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert_asked_once(tmp_path / "out/run.sqlite")


def test_the_time_of_a_killed_session_counts(tmp_path: Path) -> None:
    steps = iter((lambda: time.sleep(0.3), lambda: None, sys.exit))
    engine = ScriptedEngine(before_batch=lambda: next(steps)())
    source = write(tmp_path / "in.jsonl", choice_rows(4))
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out", engine)
    assert run(source, tmp_path / "out").seconds["detect"] > 0.3


def test_the_times_of_the_stages_are_those_of_all_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("robustft.store.time.perf_counter", lambda: now)
    source = write(tmp_path / "in.jsonl", choice_rows(4))
    config = CleanConfig(str(source), tmp_path / "out", detector="paper")
    engine = ScriptedEngine(before_batch=lambda: take(0.05))
    first, second = (
        run_clean(
            config,
            engine=engine,
            embedder=LetterEmbedder(),
            announce=lambda known, loading=loading: take(loading),  # type: ignore[misc]
        )
        for loading in (0.4, 0.2)
    )
    assert (first.earlier, second.earlier) == (0, pytest.approx(first.seconds["total"]))
    assert first.seconds["total"] > 0.4
    assert first.seconds["load"] == pytest.approx(0.4)
    assert second.seconds["load"] == pytest.approx(0.6)
    assert second.seconds["detect"] == first.seconds["detect"] > 0
    for one in (first, second):
        stages = sum(value for name, value in one.seconds.items() if name != "total")
        assert stages == pytest.approx(one.seconds["total"] + one.earlier)


def test_the_time_of_publishing_is_that_of_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    publish = shards.publish

    def slow(folder: Path, *rest: Any) -> None:
        nonlocal now
        publish(folder, *rest)
        now += 3.0

    monkeypatch.setattr("robustft.store.time.perf_counter", lambda: now)
    monkeypatch.setattr("robustft.pipeline.publish", slow)
    result = run(write(tmp_path / "in.jsonl", choice_rows(4)), tmp_path / "out")
    assert {stage: result.seconds[stage] for stage in ("detect", "relabel", "load")} == {
        "detect": 3.0, "relabel": 3.0, "load": 0.0,
    }  # fmt: skip
