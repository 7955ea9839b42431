from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from robustft.corruption import corrupt
from robustft.errors import UserError
from robustft.predictions import judge
from robustft.records import Record, open_records
from robustft.reproduction import tasks
from robustft.reproduction.tasks import TASKS, judge_drop, task_files


def record(answer: str, options: tuple[str, ...] | None = None, **row: object) -> Record:
    return Record(0, 1, "0", "?", options, answer, (), {"answer": answer, **row})


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("reply", "gold", "right"),
    [
        ("New York", record("New York"), True),
        ("The answer is New York.", record("new york"), True),
        ("New Jersey", record("New York"), False),
        ("New York", record("York", answers=["New York", "NYC"]), True),
        ("nyc", record("New York", answers='["New York City", "NYC"]'), True),
        ("Boston", record("New York", answers=["NYC"]), False),
        ("007", record("007"), True),
        ("008", record("007"), False),
        ("7", record("007"), False),
        ("**Answer:** 18", record("18"), True),
        ("", record("New York"), False),
        ("   \n", record("18"), False),
        ("word " * 20_000, record("New York"), False),
        ("x" * 100_000 + "\nThe answer is 18.", record("18"), True),
    ],
    ids=str,
)
def test_replies_are_scored_as_a_person_would(reply: str, gold: Record, right: bool) -> None:
    answer, found, score = judge(gold, reply)
    assert (found, score) == (right, float(right))
    if not reply.strip():
        assert answer is None


def test_a_letter_in_bold_is_read() -> None:
    from robustft.answers import parse

    assert parse("**Answer:** B", kind="choice", options=("yes", "no", "maybe")).answer == "B"
    assert parse("", kind="choice", options=("yes", "no")).answer is None
    assert parse("B " * 50_000, kind="choice", options=("yes", "no")).answer in (None, "B")


def test_drop_reads_lists_of_spans_and_of_gold_answers() -> None:
    two = record("Smith, Jones", golds=[["Smith", "Jones"]])
    assert judge_drop(two, "Jones and Smith")[1:] == (True, 1.0)
    assert judge_drop(two, "Answer: Smith, Jones")[1:] == (True, 1.0)
    assert judge_drop(two, "Smith")[1:] == (False, 0.5)
    assert judge_drop(record("5", golds='[["5"], ["5 yards"]]'), "5 yards")[1:] == (True, 1.0)
    assert judge_drop(record("5", golds=["5", "five"]), "five")[1:] == (True, 1.0)
    assert judge_drop(record("5"), "") == (None, False, 0.0)


def test_local_files_are_found_in_both_layouts(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "options": ["a", "b", "c"], "answer": "A"} for n in range(20)]
    for name in ("labeled", "test", "noisy/noisy30"):
        write(tmp_path / "data" / "fpb" / f"{name}.jsonl", rows)
    work = tmp_path / "work"
    files = task_files(TASKS["fpb"], 30, 0, str(tmp_path / "data"), work)
    assert files.noisy == tmp_path / "data" / "fpb" / "noisy" / "noisy30.jsonl"
    assert task_files(TASKS["fpb"], 0, 0, str(tmp_path / "data"), work).noisy == files.labeled
    made = task_files(TASKS["fpb"], 50, 0, str(tmp_path / "data"), work).noisy
    wrong = [r for r in open_records(str(made)) if isinstance(r, Record) and r.answer != "A"]
    assert len(wrong) == 10
    with pytest.raises(UserError, match=r"no data: .*arc has no labeled\.csv"):
        task_files(TASKS["arc"], 30, 0, str(tmp_path / "data"), work)


def test_other_data_get_a_noisy_copy_of_their_own(tmp_path: Path) -> None:
    data, work = tmp_path / "data", tmp_path / "work"
    for name in ("first", "second", "first"):
        rows = [{"question": f"{name} {n}", "options": ["a", "b"], "answer": "A"} for n in range(4)]
        for part in ("labeled", "test"):
            write(data / "fpb" / f"{part}.jsonl", rows)
        made = task_files(TASKS["fpb"], 50, 0, str(data), work).noisy
        asked = [r.question for r in open_records(str(made)) if isinstance(r, Record)]
        assert asked == [f"{name} {n}" for n in range(4)]
    assert len(list((work / "fpb").glob("*.truth.jsonl"))) == 2


def test_noise_of_open_answers_is_another_records_answer_of_the_same_kind(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": str(n) if n % 2 else f"town {chr(65 + n)}"}
            for n in range(20)]  # fmt: skip
    source = open_records(str(write(tmp_path / "a.jsonl", rows)))
    changed = {}
    for rate in (0.3, 0.5, 0.7):
        corrupt(source, rate, 0, tmp_path / f"n{rate}.jsonl")
        truth = (tmp_path / f"n{rate}.jsonl.truth.jsonl").read_text().splitlines()
        lines = [line for line in map(json.loads, truth) if line["corrupted"]]
        assert len(lines) == round(20 * rate)
        assert all(line["given"].isdigit() == line["truth"].isdigit() for line in lines)
        assert all(line["given"] != line["truth"] for line in lines)
        changed[rate] = {line["id"]: line["given"] for line in lines}
    assert changed[0.3].items() <= changed[0.5].items() <= changed[0.7].items()


HUB = {
    "mmlu": {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "law"},
    "arc": {"id": "1", "question": "q", "answerKey": "2",
            "choices": {"label": ["1", "2"], "text": ["a", "b"]}},
    "pubmedqa": {"pubid": 7, "question": "q", "context": {"contexts": ["c"]},
                 "final_decision": "no"},
    "drop": {"query_id": "x", "passage": "p", "question": "q",
             "answer": {"number": "", "spans": ["Smith", "Jones"],
                        "date": {"day": "", "month": "", "year": ""}},
             "validated_answers": {"number": ["2", ""], "spans": [[], []],
                                   "date": [{"day": "", "month": "", "year": ""}] * 2}},
    "fpb": {"sentence": "s", "label": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_rows_of_the_hub_become_records(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reader:
        def rows(self) -> list[tuple[int, object]]:
            return [(1, HUB[name])]

    monkeypatch.setattr(tasks, "open_reader", lambda path, split, limit: Reader())
    files = task_files(TASKS[name], 0, 0, None, tmp_path)
    (found,) = open_records(str(files.labeled))
    assert isinstance(found, Record)
    expected = {"mmlu": "C", "arc": "B", "pubmedqa": "B", "drop": "Smith, Jones", "fpb": "B"}
    assert found.answer == expected[name]
    assert (found.options is None) == (name == "drop")


def test_every_validators_answer_to_a_drop_question_is_one_of_its_own() -> None:
    nothing = {"day": "", "month": "", "year": ""}
    answers = [
        {"number": "", "spans": ["Chaz Schilens"], "date": nothing},
        {"number": "", "spans": ["JaMarcus Russell"], "date": nothing},
        {"number": "", "spans": [], "date": nothing | {"month": "May", "year": "1998"}},
        {"number": "", "spans": [], "date": nothing},
    ]
    by_field = {name: [one[name] for one in answers] for name in answers[0]}
    row: dict[str, Any] = {
        "query_id": "x", "passage": "p", "question": "q",
        "answer": {"number": "7", "spans": [], "date": nothing},
    }  # fmt: skip
    for more in (answers, by_field):
        made = TASKS["drop"].convert(row | {"validated_answers": more})
        assert made is not None
        assert made["golds"] == [["7"], ["Chaz Schilens"], ["JaMarcus Russell"], ["May 1998"]]
        for reply in ("7", "Chaz Schilens", "JaMarcus Russell", "May 1998"):
            assert judge_drop(record("7", golds=made["golds"]), reply)[1:] == (True, 1.0), reply
    assert TASKS["drop"].convert(row | {"answer": answers[-1]}) is None


def test_no_hub_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(path: str, split: str, limit: int) -> object:
        raise UserError("the Hugging Face hub cannot be reached")

    monkeypatch.setattr(tasks, "open_reader", offline)
    with pytest.raises(UserError, match="no data: the Hugging Face hub cannot be reached"):
        task_files(TASKS["fpb"], 30, 0, None, tmp_path)


def test_a_single_split_is_shared_without_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reader:
        def rows(self) -> list[tuple[int, object]]:
            return [(n, HUB["pubmedqa"] | {"pubid": n}) for n in range(10)]

    monkeypatch.setattr(tasks, "open_reader", lambda path, split, limit: Reader())
    files = task_files(TASKS["pubmedqa"], 0, 0, None, tmp_path)
    ids = [[r.id for r in open_records(str(f)) if isinstance(r, Record)]
           for f in (files.labeled, files.test)]  # fmt: skip
    assert ids == [["0", "2", "4", "6", "8"], ["1", "3", "5", "7", "9"]]
