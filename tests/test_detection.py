"""What detection says of a corpus it could not judge, or hardly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import write

from robustft import crowd
from robustft.crowd import Estimate, Judgement
from robustft.detection.detectors import CrowdDetector
from robustft.detection.evidence import stacked
from robustft.detection.rule import Asked
from robustft.detection.warnings import (
    OPEN_ANSWERS_DIFFER,
    RULES_PASS,
    TEXTS_DIFFER,
    models_contradict,
)
from robustft.opinions import Opinion
from robustft.records import Record, open_records

LONG = "one two three four five six seven eight"


def warned(folder: Path, given: list[str], said: list[str], **options: Any) -> tuple[str, ...]:
    rows = [{"question": f"q {n}?", "answer": answer, **options} for n, answer in enumerate(given)]
    records = list(open_records(str(write(folder / "in.jsonl", rows))))
    asked = [
        Asked(record, Opinion(answer, answer), None, None)
        for record, answer in zip(records, said, strict=True)
        if isinstance(record, Record)
    ]
    assert len(asked) == len(given)
    detector = CrowdDetector()
    parts = [detector.evidence(part) for part in (asked[:5], asked[5:])]
    return detector.conclude(stacked(parts), None).warnings  # type: ignore[arg-type]


def test_of_numbers_that_agree_half_the_time_one_model_cannot_tell(tmp_path: Path) -> None:
    [said] = warned(tmp_path, ["7"] * 40, ["7"] * 20 + ["8"] * 20)
    assert said.startswith("with one model alone the noise rate stays open, 0% to 6")
    assert "--detector paper" in said


def test_free_texts_that_share_no_words(tmp_path: Path) -> None:
    found = warned(tmp_path, [f"{LONG} {n}" for n in range(20)], ["quite another reply"] * 20)
    assert found == (TEXTS_DIFFER, OPEN_ANSWERS_DIFFER)


def test_evidence_of_before_tells_who_was_silent() -> None:
    nobody = np.zeros(40, np.int64)
    evidence = {
        "unjudged": nobody > 0, "question": np.arange(40), "given": nobody - 1, "options": nobody,
        "width": nobody, "clusters": np.array([[0, 0]] * 30 + [[0, 1]] * 10),
        "answered": np.arange(40) < 35,
    }  # fmt: skip
    wrong = CrowdDetector().conclude(evidence, None).wrong  # type: ignore[arg-type]
    assert np.isnan(wrong[35:]).all()
    assert not np.isnan(wrong[:35]).any()


@pytest.mark.parametrize("given", ["7", "a few words", f"{LONG}\n#### 7"])
def test_other_answers_that_never_agree(given: str, tmp_path: Path) -> None:
    assert warned(tmp_path, [given] * 20, ["8"] * 20) == (OPEN_ANSWERS_DIFFER,)


class _Rows:
    """A corpus in memory, whose questions have no word in common."""

    threads = 1

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        return self._rows[positions]

    def questions(self, positions: np.ndarray) -> Iterator[str]:
        return (f"q{position}" for position in positions)


def noticed(
    rows: np.ndarray, given: np.ndarray, expert: np.ndarray, options: np.ndarray | int = 7
) -> tuple[str, ...]:
    evidence = {
        "unjudged": np.zeros(len(given), np.bool_), "question": np.arange(len(given)),
        "given": given.astype(np.int8), "options": np.full(len(given), options),
        "width": np.full(len(given), 3, np.int8), "clusters": np.zeros((len(given), 2), np.int8),
        "answered": np.ones(len(given), np.bool_), "base": expert.astype(np.float32),
    }  # fmt: skip
    return CrowdDetector().conclude(evidence, _Rows(rows)).warnings


def test_where_nothing_is_found_it_is_said_what_cannot_be_seen() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=400)
    rows = rng.normal(size=(3, 16))[truth] * 2 + rng.normal(size=(400, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    ignorant = np.full((400, 3), 1 / 3)
    merged = np.where(truth == 2, 1, truth)  # one label in place of another, throughout
    assert noticed(rows, merged, ignorant) == (RULES_PASS,)
    scattered = np.where(rng.random(400) < 0.2, (truth + 1) % 3, truth)
    assert noticed(rows, scattered, ignorant) == ()


def test_models_that_find_more_than_the_learners_let_stand_are_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, given = np.zeros((9, 16), np.float32), np.zeros(9, np.int64)
    said, few, many = np.full((9, 3), 1 / 3), Estimate(0.01, 0.0, 0.015), Estimate(0.2, 0.15, 0.25)
    for by_panel, told in ((None, RULES_PASS), (few, RULES_PASS), (many, models_contradict(many))):
        found = Judgement(
            np.zeros(9), few, {"base": 0.1, "regression": 0.9}, said, {"regression": said}, by_panel
        )
        monkeypatch.setattr(crowd, "judge_labels", lambda *a, found=found, **k: found)
        assert noticed(rows, given, said) == (told,)
    assert "20% (15 to 25) of the given answers" in told


def test_what_models_find_in_a_small_part_is_not_said_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, many = Estimate(0.01, 0.0, 0.015), Estimate(0.5, 0.4, 0.6)

    def judged(panel: object, given: np.ndarray, *rest: object, **named: object) -> Judgement:
        said = np.full((len(given), 3), 1 / 3)
        by_panel = many if len(given) == part else None
        votes = {"base": 0.1, "regression": 0.9}
        return Judgement(np.zeros(len(given)), few, votes, said, {"regression": said}, by_panel)

    monkeypatch.setattr(crowd, "judge_labels", judged)
    for part, told in ((40, RULES_PASS), (300, models_contradict(Estimate(0.157, 0.12, 0.19)))):
        options = np.repeat([7, 8], [1000 - part, part])
        rows, given = np.zeros((1000, 16), np.float32), np.zeros(1000, np.int64)
        assert noticed(rows, given, np.full((1000, 3), 1 / 3), options) == (told,)
