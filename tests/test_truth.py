"""Verdicts against the truth."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from robustft.errors import UserError
from robustft.records import open_records
from robustft.truth import check, compare, written_by_corrupt

VERDICTS = [  # id, verdict, score, given, answer
    ("a", "noisy", 0.9, "A", "B"),
    ("b", "noisy", 0.6, "A", None),
    ("c", "clean", 0.2, "the cat", "the cat"),
    ("d", "clean", 0.3, "12", "12"),
    ("e", "not judged", None, "C", "C"),
]
TRUTH = {"a": "B", "b": "A", "c": "The cat.", "d": "13", "e": "D"}


def write(folder: Path, verdicts: list[tuple[object, ...]], truth: dict[str, str]) -> str:
    names = ("id", "verdict", "noise_score", "given", "answer")
    lines = [dict(zip(names, verdict, strict=True)) for verdict in verdicts]
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = [{"id": id_, "truth": value} for id_, value in truth.items()]
    path = folder / "truth.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in known))
    return str(path)


def test_counts_by_hand(tmp_path: Path) -> None:
    found = compare(tmp_path, write(tmp_path, VERDICTS, TRUTH | {"beyond the limit": "A"}))
    assert (found.records, found.wrong, found.noisy, found.hits) == (5, 3, 2, 1)
    assert (found.kept, found.right) == (4, 2)  # a and c
    assert found.ranked == 0.75  # wrong .9 .3 over right .6 .2: three of four pairs
    assert "precision 50%, recall 33%" in str(found)
    assert "40.0% as given, 50.0% of 4 in the training set" in str(found)


def test_nothing_judged_or_nothing_there(tmp_path: Path) -> None:
    found = compare(tmp_path, write(tmp_path, VERDICTS[4:], {"e": "D"}))
    assert (found.wrong, found.ranked) == (1, None)
    assert "noise_score" not in str(found)
    assert compare(tmp_path, write(tmp_path, [], {"e": "D"})).records == 0


def test_the_truth_may_be_the_records_with_right_answers(tmp_path: Path) -> None:
    verdicts: list[tuple[object, ...]] = [
        ("7", "noisy", 0.9, "A", "B"),
        ("8", "clean", 0.1, "B", "B"),
    ]
    write(tmp_path, verdicts, {})
    rows = [{"id": n, "question": "Q?", "options": ["x", "y"], "answer": "B"} for n in "78"]
    truth = tmp_path / "labeled.jsonl"
    truth.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check(str(truth))
    found = compare(tmp_path, str(truth))
    assert (found.records, found.wrong, found.noisy, found.hits, found.right) == (2, 1, 1, 1, 2)


def test_the_truth_may_have_the_field_names_of_the_input(tmp_path: Path) -> None:
    write(tmp_path, [("7", "noisy", 0.9, "red", "blue"), ("8", "clean", 0.1, "red", "red")], {})
    truth = tmp_path / "labeled.jsonl"
    for names in (("Prompt", "Label"), ("question", "answer")):
        rows = [{"id": "7", names[0]: "Sky?", names[1]: "blue"},
                {"id": "8", names[0]: "Rose?", names[1]: "red"}]  # fmt: skip
        truth.write_text("".join(json.dumps(row) + "\n" for row in rows))
        check(str(truth), schema="qa:Prompt,Label")
        found = compare(tmp_path, str(truth), "qa:Prompt,Label")
        assert (found.records, found.wrong, found.hits) == (2, 1, 1)


def test_records_without_ids_are_told_by_their_questions(tmp_path: Path) -> None:
    def records(name: str, questions: str) -> str:
        path = tmp_path / f"{name}.jsonl"
        rows = [{"question": f"How   is {one}?", "answer": "y"} for one in questions]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    source = open_records(records("in", "PQRS"))
    check(records("labeled", "pqrs"), source)
    check(records("longer", "PQRSTUVW"), source)
    check(records("half", "PQXY"), source)  # some were worded anew
    with pytest.raises(UserError, match=r"expected the question 'How   is Q\?', found 'How   is X"):
        check(records("other", "PXYZ"), source)
    with_ids = tmp_path / "ids.jsonl"
    with_ids.write_text("".join(json.dumps({"id": n, "question": "?", "answer": "y"}) + "\n"
                                for n in "7890"))  # fmt: skip
    check(str(with_ids), open_records(str(with_ids)))


def test_what_was_corrupted_otherwise_is_another_input(tmp_path: Path) -> None:
    path = Path(write(tmp_path, VERDICTS[:1], TRUTH))
    path.write_text(json.dumps({"id": "a", "truth": "B", "given": "C"}) + "\n")
    with pytest.raises(UserError, match="record 1: expected the given answer 'A', found 'C'"):
        compare(tmp_path, str(path))
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "question": "?", "answer": "A"}))
    with pytest.raises(UserError, match="record 1: expected the given answer 'A', found 'C'"):
        check(str(path), open_records(str(tmp_path / "in.jsonl")))


def test_a_truth_of_another_input_is_refused(tmp_path: Path) -> None:
    rows = [{"id": id_, "question": "?", "answer": "A"} for id_ in "ab"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for truth, said in (({"x": "B"}, "'x'"), ({"a": "B"}, "nothing")):
        path = write(tmp_path, VERDICTS[:2], truth)
        with pytest.raises(UserError, match=rf"expected the id '[ab]', found {said}"):
            compare(tmp_path, path)
        with pytest.raises(UserError, match=rf"expected the id '[ab]', found {said}"):
            check(path, open_records(str(tmp_path / "in.jsonl")))


def test_an_array_on_one_line_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "labeled.json"
    path.write_bytes(b"[" + b" " * (8 << 20))
    tracemalloc.start()
    assert not written_by_corrupt(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "truth": null}\n', "line 1: expected id and truth"),
        ('{"id": 1, "truth": "A"}\n', "line 1: expected id and truth"),
        ("{broken\n", "truth.jsonl"),
        ("", "truth.jsonl"),
        (None, "truth.jsonl"),
    ],
)
def test_a_truth_that_cannot_be_read_is_refused_at_once(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "truth.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        check(str(path))
