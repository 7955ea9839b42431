"""What the end of a run warns of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from robustft.config import CleanConfig
from robustft.finishing import left_the_set, vanished


def test_answers_that_all_but_left_the_training_set() -> None:
    before = {"A": 20, "B": 27, "C": 13, "D": 4}
    assert vanished(before, {"A": 21, "B": 28}) == ["C"]  # four records are too few to tell
    assert vanished(before, {"A": 10, "B": 14, "C": 7, "D": 2}) == []
    assert vanished(before, {"A": 2, "B": 3, "C": 1}) == []  # little is left of anything
    assert vanished(before, {}) == []
    assert vanished({}, {}) == []


def test_a_larger_share_is_advised_only_where_a_share_was_selected() -> None:
    config = CleanConfig("in.csv", Path("out"))
    told = left_the_set("A", 20, 1, config)
    assert told == (
        "answer A has all but left the training set: 20 records before, 1 after; verdicts.jsonl "
        "says why, --beta 1 keeps more"
    )
    for other in ({"beta": 1.0}, {"without": frozenset({"selection"})}):
        assert "--beta" not in left_the_set("A", 20, 1, replace(config, **other))  # type: ignore[arg-type]
