"""DROP's metric: expected values are what the official evaluation script gives for this list."""

from __future__ import annotations

import pytest

from robustft.reproduction.drop import best_score, drop_score, gold_spans

HARD = [  # said, gold, exact match, F1
    (["5 yards"], ["5"], False, 0.67),
    (["5-yard"], ["5 yard"], True, 1.0),
    (["5"], ["5.0"], True, 1.0),
    (["1,200"], ["1200"], True, 1.0),
    (["12"], ["13"], False, 0.0),
    (["12 men"], ["13 men"], False, 0.0),
    (["$5"], ["5"], True, 1.0),
    (["50%"], ["50"], True, 1.0),
    (["-3"], ["3"], True, 1.0),  # a hyphen separates words: the sign is lost
    (["007"], ["7"], True, 1.0),
    (["twelve"], ["12"], False, 0.0),
    (["3 May 1998"], ["May 3 1998"], False, 1.0),
    (["May 1998"], ["3 May 1998"], False, 0.8),
    (["May 1999"], ["May 1998"], False, 0.0),
    (["The Bears"], ["Bears"], True, 1.0),
    (["a Bears the"], ["an bears"], True, 1.0),
    (["U.S."], ["US"], True, 1.0),
    (["New York"], ["New Jersey"], False, 0.5),
    (["York New"], ["New York"], False, 1.0),
    (["O'Neil"], ["oneil"], True, 1.0),
    (["Smith", "Jones"], ["Jones", "Smith"], True, 1.0),
    (["Smith and Jones"], ["Smith", "Jones"], False, 0.25),
    (["Smith"], ["Smith", "Jones"], False, 0.5),
    (["Smith", "Jones", "Lee"], ["Smith", "Jones"], False, 0.67),
    (["Smith", "Smith"], ["Smith"], False, 0.5),
    (["3 yards", "5 yards"], ["5 yards", "3 yards"], True, 1.0),
    (["3 yards", "5 yards"], ["5 yards", "4 yards"], False, 0.5),
    ([""], ["Smith"], False, 0.0),
    ([], [""], True, 1.0),
    (["the"], ["a"], True, 1.0),
]


@pytest.mark.parametrize(("said", "gold", "exact", "f1"), HARD)
def test_hard_cases(said: list[str], gold: list[str], exact: bool, f1: float) -> None:
    assert drop_score(said, gold) == (exact, f1)


def test_the_best_of_several_gold_answers_counts() -> None:
    assert best_score(["5"], [["6"], ["5 yards"], ["5"]]) == (True, 1.0)
    assert best_score(["5"], []) == (False, 0.0)


def test_gold_answers_of_the_published_files() -> None:
    date = {"day": "3", "month": "May", "year": "1998"}
    none = {"day": "", "month": "", "year": ""}
    assert gold_spans({"number": "12", "spans": [], "date": none}) == ["12"]
    assert gold_spans({"number": "", "spans": ["Smith", "Jones"], "date": none}) == [
        "Smith",
        "Jones",
    ]
    assert gold_spans({"number": "", "spans": [], "date": date}) == ["3 May 1998"]


def test_a_reply_of_many_spans_ends() -> None:
    assert drop_score(["x"] * 100_000, ["y"]) == (False, 0.0)
