"""What the end of a run warns of."""

from __future__ import annotations

from robustft.finishing import vanished


def test_answers_that_all_but_left_the_training_set() -> None:
    before = {"A": 20, "B": 27, "C": 13, "D": 4}
    assert vanished(before, {"A": 21, "B": 28}) == ["C"]  # four records are too few to tell
    assert vanished(before, {"A": 10, "B": 14, "C": 7, "D": 2}) == []
    assert vanished(before, {"A": 2, "B": 3, "C": 1}) == []  # little is left of anything
    assert vanished(before, {}) == []
    assert vanished({}, {}) == []
