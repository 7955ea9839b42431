"""Options given in place of others, counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from robustft.cli.console import print_clean_summary
from robustft.confusions import Confusion, Confusions
from robustft.records import Record
from robustft.verdicts import CleanResult

TONES = ("negative", "neutral", "positive")


def record(answer: str, options: tuple[str, ...] | None = TONES) -> Record:
    return Record(0, 0, "0", "?", options, answer, (), {})


def counted(
    rows: Sequence[tuple[Record, int, str, bool | None]], juries: int = 1, unit: int = 7
) -> tuple[Confusion, ...]:
    """Of (record, jury, letter held right, noisy or None where not judged), unit by unit."""
    counts = Confusions(juries, 3)
    for low in range(0, len(rows), unit):
        records, jury, right, noisy = zip(*rows[low : low + unit], strict=True)
        counts.add(
            records,
            np.array(jury, np.int8),
            np.eye(3)[["ABC".index(letter) for letter in right]],
            np.array([bool(found) for found in noisy]),
            np.array([found is None for found in noisy]),
        )
    return counts.found()


def test_pairs_with_their_share_of_what_they_stand_for() -> None:
    rows = [
        *[(record("B"), 0, "C", True)] * 12,
        *[(record("A"), 0, "C", True)] * 2,
        *[(record("C"), 0, "C", False)] * 16,
        *[(record("B"), 0, "B", False)] * 40,
        *[(record("B"), 0, "B", True)] * 3,  # noisy, and yet nothing is likelier
        (record("A"), 0, "B", None),
        (record("A"), -1, "B", True),
        (record("text", None), 0, "A", True),
    ]
    first, second = counted(rows)
    assert first == Confusion("neutral", "positive", 12, held_right=30, noisy=17, options=3)
    assert (second.given, second.right, second.records) == ("negative", "positive", 2)
    assert first.prevails
    assert not second.prevails
    assert str(first) == '"neutral" given for "positive": 12 of 17 found noisy'
    assert counted(rows, unit=1) == counted(rows, unit=100) == (first, second)


def test_nothing_noisy_is_nothing_found() -> None:
    assert counted([(record("A"), 0, "A", False)] * 20) == ()
    assert counted([]) == ()


def test_without_a_crowd_nothing_is_known() -> None:
    counts, nobody = Confusions(0, 0), np.full(2, -1, np.int8)
    yes, no = np.ones(2, np.bool_), np.zeros(2, np.bool_)
    counts.add([record("A")] * 2, nobody, np.zeros((2, 0)), yes, no)
    assert counts.found() == ()


def test_letters_that_mean_something_else_in_every_question_say_nothing() -> None:
    rows = [(record("A", (f"{n}", "x", "y")), 0, "B", True) for n in range(20)]
    assert counted(rows) == ()
    assert counted(rows[:1]) == ()  # nor does a single record
    # One jury's options differ, the other's do not: only the latter are shown.
    shared = [
        (record("A", ("No.", "yes")), 1, "B", True),
        (record("A", ("no", "Yes")), 1, "B", True),
    ]
    assert counted(rows + shared, juries=2) == (Confusion("No.", "yes", 2, 2, 2, 2),)


def test_the_order_of_the_options_does_not_matter() -> None:
    rows = [
        *[(record("B"), 0, "C", True)] * 4,
        *[(record("A", ("neutral", "positive", "negative")), 1, "B", True)] * 5,
    ]
    assert counted(rows, juries=2) == (Confusion("neutral", "positive", 9, 9, 9, 3),)


def test_the_first_spelling_of_an_option_is_shown() -> None:
    rows = [
        (record("A", (f"No{'.' * dots}", "yes")), 0, "B", True) for dots in (3, 1, 4, 2, 6, 5, 0)
    ]
    assert counted(rows) == (Confusion("No...", "yes", 7, 7, 7, 2),)


def test_options_that_read_the_same_are_not_given_for_each_other() -> None:
    assert counted([(record("A", ("yes", "Yes", "no")), 0, "B", True)] * 3) == ()


def test_eight_are_enough() -> None:
    sets = [tuple(f"{name}{number}" for name in TONES) for number in range(5)]
    rows = [
        (record(given, options), number, right, True)
        for number, options in enumerate(sets)
        for given, right, times in (("A", "B", 3), ("B", "C", 2 + number))
        for _ in range(times)
    ]
    found = counted(rows, juries=5)
    assert [one.records for one in found] == [6, 5, 4, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("records", "noisy", "options", "prevails"),
    [
        (10, 20, 3, True),
        (9, 9, 3, False),  # too few to tell
        (10, 21, 3, False),
        (60, 100, 2, False),  # one of the two pairs always makes up half
        (75, 100, 2, True),
    ],
)
def test_a_rule_is_most_of_what_is_noisy(
    records: int, noisy: int, options: int, prevails: bool
) -> None:
    assert Confusion("a", "b", records, 300, noisy, options).prevails is prevails


def test_the_terminal_is_told_of_one_rule_and_cannot_be_driven(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = CleanResult(Path("out"), Path("out/cleaned.jsonl"), seconds={"total": 1.0})
    result.confusions = (
        Confusion("few", "b", 30, 90, 300, 3),
        Confusion("\x1b[2J\u202eno\n", "yes" * 20, 20, 50, 25, 3),
        Confusion("also", "b", 12, 50, 15, 3),
    )
    print_clean_summary(result)
    said = capsys.readouterr().out
    told = [line for line in said.splitlines() if line.startswith("mostly")]
    assert told == [
        'mostly        "\\x1b[2J\\u202eno\\n" given for "' + ("yes" * 20)[:40]
        + '…": 20 of 25 found noisy'
    ]  # fmt: skip
    result.confusions = ()
    print_clean_summary(result)
    assert "mostly" not in capsys.readouterr().out
