"""A run in one folder is resumed with another detector: what was said is judged anew."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import read, write
from runs import run, worded_rows
from scripted import REASON, FlakyEngine, ScriptedEngine, hashed

from robustft import cleaning, decisions
from robustft.engines import Prompt
from robustft.pipeline import ShardRun
from robustft.shards import withdraw
from robustft.store import Store

WORDS = ("zebra", "zoo"), ("quick", "quiz"), ("happy", "yarn")


def knowing(prompt: Prompt, candidates: Sequence[str]) -> list[float]:
    """Most on the letter that the question's words tell; a checker says anything."""
    if len(candidates) != 3:
        return hashed(prompt, candidates)
    text = prompt.messages[-1].content
    counts = [sum(map(text.count, words)) for words in WORDS]
    concentration = np.full(3, 0.4)
    concentration[counts.index(max(counts))] = 4.0
    shares = np.random.default_rng(zlib.crc32(text.encode())).dirichlet(concentration)
    return list(0.99 * shares + 0.003)


def expert() -> ScriptedEngine:
    return ScriptedEngine(choose=knowing)


class LateFailures(FlakyEngine):
    """Fails on some requests once `late`."""

    late = False

    def _or_failure(self, prompts: Sequence[Prompt], replies: Sequence[Any]) -> list[Any]:
        return super()._or_failure(prompts, replies) if self.late else list(replies)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", worded_rows(200, wrong=0.3)[0])


def same_outputs(one: Path, other: Path) -> bool:
    names = ("cleaned.jsonl", "verdicts.jsonl")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("detectors", [("crowd", "panel"), ("paper", "crowd"), ("panel", "paper")])
def test_another_detector_judges_what_was_said(
    tmp_path: Path, source: Path, detectors: tuple[str, str]
) -> None:
    first, second = detectors
    run(source, tmp_path / "out", expert(), detector=first)
    engine, fresh = expert(), expert()
    again = run(source, tmp_path / "out", engine, detector=second)
    run(source, tmp_path / "fresh", fresh, detector=second)
    assert same_outputs(tmp_path / "out", tmp_path / "fresh")
    # Whoever is newly noisy is answered again, with other neighbours: nothing else is asked.
    assert len(engine.asked) <= len(fresh.asked) - 200 * 2
    assert again.counts["input"] == 200


def test_going_back_to_a_detector_asks_nothing(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    run(source, out, expert(), detector="paper")
    for name in ("cleaned.jsonl", "verdicts.jsonl"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    between, engine = expert(), expert()
    run(source, out, between, detector="panel")
    assert between.asked  # of other neighbours than before, too
    assert not same_outputs(out, tmp_path)
    run(source, out, engine, detector="paper")
    assert not engine.asked
    assert same_outputs(out, tmp_path)


def test_where_a_question_fails_an_answer_to_another_one_does_not_stand_for_it(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "out", expert(), detector="paper")
    relabel, engine = ShardRun.relabel, LateFailures(3, choose=knowing)

    def failing(self: ShardRun, *given: Any) -> None:
        engine.late = True
        relabel(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(ShardRun, "relabel", failing)
        result = run(source, tmp_path / "out", engine, detector="panel")
    lost = [v for v in read(tmp_path / "out/verdicts.jsonl") if REASON in v["reason"]]
    assert len(lost) == result.unanswered == engine.failed
    assert all(verdict["action"] == "drop" for verdict in lost)
    run(source, tmp_path / "out", expert(), detector="panel")
    run(source, tmp_path / "fresh", expert(), detector="panel")
    assert same_outputs(tmp_path / "out", tmp_path / "fresh")


@pytest.mark.parametrize("resumed", ["paper", "panel"])
@pytest.mark.parametrize("step", range(6))
def test_killed_while_the_detector_changes(
    tmp_path: Path, source: Path, step: int, resumed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "out", expert(), detector="paper")
    steps = iter(range(6))

    def killed(function: Any) -> Any:
        def step_or_end(*given: Any, **named: Any) -> Any:
            if next(steps) == step:
                raise KeyboardInterrupt
            return function(*given, **named)

        return step_or_end

    with monkeypatch.context() as patch:
        patch.setattr(decisions, "withdraw", killed(withdraw))
        patch.setattr(Store, "judge_again", killed(Store.judge_again))
        patch.setattr(cleaning, "reopen", killed(cleaning.reopen))
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", expert(), detector="panel")
    run(source, tmp_path / "out", expert(), detector=resumed)
    run(source, tmp_path / "fresh", expert(), detector=resumed)
    assert same_outputs(tmp_path / "out", tmp_path / "fresh")


def test_the_time_of_a_split_that_was_taken_back_counts(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    make = decisions.make_detector

    def slow(config: Any) -> Any:
        nonlocal now
        now += 5.0
        return make(config)

    monkeypatch.setattr("robustft.store.time.perf_counter", lambda: now)
    monkeypatch.setattr(decisions, "make_detector", slow)
    first = run(source, tmp_path / "out", expert(), detector="paper")
    second = run(source, tmp_path / "out", expert(), detector="panel")
    third = run(source, tmp_path / "out", expert(), detector="panel")
    assert [one.seconds["split"] for one in (first, second, third)] == [5.0, 10.0, 10.0]
    assert [one.seconds["total"] + one.earlier for one in (first, second, third)] == [5, 10, 10]


def test_a_panel_has_no_learners(tmp_path: Path, source: Path) -> None:
    result = run(source, tmp_path / "out", expert(), detector="panel")
    assert set(result.weights) == {"base", "reasoned"}
