"""Words for the terminal."""

from __future__ import annotations

from robustft.evaluation import EvalResult
from robustft.terminal import counted, percentages, plural_of
from robustft.truth import Comparison


def test_one_is_not_counted_as_many() -> None:
    assert counted(1, "reply", "replies") == "1 reply"
    assert counted(12_345, "record") == "12,345 records"
    assert plural_of(1, "was", "were") == "was"
    assert [plural_of(number, "line") for number in (0, 1, 2)] == ["lines", "line", "lines"]


def test_percentages_add_up() -> None:
    assert percentages([0.336, 0.336, 0.328, 0.0]) == [34, 33, 33, 0]
    assert percentages([0.29, 0.71]) == [29, 71]  # 100 * 0.29 is less than 29
    assert percentages([1 / 3] * 3) == [34, 33, 33]
    assert percentages([0.995, 0.005]) == [100, 0]
    assert percentages([]) == []


def test_summaries_of_one_and_of_several() -> None:
    assert "1 of 3 given answers is wrong; of 2 found noisy 1 is (" in str(
        Comparison(3, wrong=1, noisy=2, hits=1, ranked=None, kept=3, right=2)
    )
    assert "2 of 3 given answers are wrong; of 2 found noisy 2 are (" in str(
        Comparison(3, wrong=2, noisy=2, hits=2, ranked=None, kept=3, right=2)
    )
    one = str(EvalResult("m", None, unanswered=1, failed=1, truncated=1))
    assert "1 reply held no readable answer and counts as wrong." in one
    assert "1 question got no reply from the engine and was left out." in one
    assert "1 prompt exceeded the model's window and lost its middle." in one
    several = str(EvalResult("m", None, unanswered=2, failed=2, truncated=2))
    assert "2 replies held no readable answer and count as wrong." in several
    assert "2 questions got no reply from the engine and were left out." in several
