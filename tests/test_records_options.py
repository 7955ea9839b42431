"""Options and their answers in the forms in which files have them, read and written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustft.errors import UserError
from robustft.records import Record, RecordWriter, Reject, open_records

TEXTS = ["apple", "stone", "car"]
LABELLED = [{"label": label, "text": text} for label, text in zip("ABC", TEXTS, strict=True)]


def called(label: str, text: str, labels: Any = "ABC", **more: Any) -> list[dict[str, Any]]:
    """The options with their labels under other names, and more fields beside them."""
    return [{label: one, text: told, **more} for one, told in zip(labels, TEXTS, strict=True)]


FORMS: dict[str, tuple[Any, Any, Any]] = {
    "id and text": (called("id", "text"), "B", "C"),
    "numbers and text": (called("id", "text", (1, 2, 3)), 2, 3),
    "floats out of order": (called("id", "text", (1.0, 3.0, 2.0)), 3, 2),
    "floats and answers": (called("id", "text", (1.0, 3.0, 2.0)), 3.0, 2.0),
    "key and value": (called("key", "value"), "B", "C"),
    "with other fields": (called("id", "text", image=None), "B", "C"),
    "columns of ids": ({"id": ["x", "y", "z"], "text": TEXTS}, "y", "z"),
    "lettered options, text": (["A. apple", "B. stone", "C. car"], "stone", "car"),
    "lettered options, letter": (["(A) apple", "(B) stone", "(C) car"], "(B)", "(C)"),
    "lettered options, all of one": (["a) apple", "b) stone", "c) car"], "b) stone", "c) car"),
    "lettered answer": (TEXTS, "B. stone", "C. car"),
    "lettered answer in brackets": (TEXTS, "(b) stone", "(c) car"),
}  # fmt: skip


def rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def written(folder: Path, path: str, answer: str) -> dict[str, Any]:
    """The first record of `path` with another answer, as it is written."""
    source = open_records(path)
    record = next(iter(source))
    assert isinstance(record, Record)
    with RecordWriter(folder / "out.jsonl", source) as writer:
        writer.write(record, answer)
    found: dict[str, Any] = json.loads((folder / "out.jsonl").read_bytes())
    return found


@pytest.mark.parametrize("form", FORMS)
def test_options_and_answers_of_every_form(tmp_path: Path, form: str) -> None:
    options, given, other = FORMS[form]
    row = {"question": "Which?", "options": options, "answer": given}
    path = rows(tmp_path / "in.jsonl", row)
    record = next(iter(open_records(path)))
    assert isinstance(record, Record)
    assert (record.options, record.answer) == (tuple(TEXTS), "B")
    assert written(tmp_path, path, "C") == {**row, "answer": other}


@pytest.mark.parametrize(
    ("options", "given", "other"),
    [
        (["No", "C", "Yes"], "No", "B"),  # "C" would be the third
        (["A. I", "B. a", "C. No"], "I", "B"),
        (["me", "me", "us"], "us", "B"),
        (["apple", ""], "A. apple", "B"),
        ({"label": ["P", "Q"], "text": ["apple", "P"]}, "apple", "Q"),
    ],
)
def test_a_new_answer_that_would_be_read_as_another_option_is_its_label_or_letter(
    tmp_path: Path, options: Any, given: str, other: str
) -> None:
    row = {"question": "Which?", "options": options, "answer": given}
    found = written(tmp_path, rows(tmp_path / "in.jsonl", row), "B")
    assert found["answer"] == other
    again = next(iter(open_records(rows(tmp_path / "again.jsonl", found))))
    assert isinstance(again, Record)
    assert again.answer == "B"


COLUMNS = {
    "columns": ({"label": list("ABC"), "text": TEXTS}, "B"),
    "columns of ids": ({"id": ["x", "y", "z"], "value": TEXTS}, "y"),
    "one object": (dict(zip("ABC", TEXTS, strict=True)), "B"),
    "one object of more": (dict(zip("ABCD", [*TEXTS, "?"], strict=True)), "B"),
    "one object, small": (dict(zip("abc", TEXTS, strict=True)), "b"),
}  # fmt: skip
OBJECTS = {
    "id and text": (called("id", "text"), "B"),
    "label and text": (LABELLED, "B"),
    "numbers": (called("label", "text", "123"), "2"),
    "key and value": (called("key", "value"), "B"),
}


@pytest.mark.parametrize("forms", [COLUMNS, OBJECTS])
def test_parquet_that_mixes_forms_holds_what_its_rows_held(
    tmp_path: Path, forms: dict[str, tuple[Any, str]]
) -> None:
    """In Parquet an object has the fields of all, which are null where a row has them not."""
    made = [{"question": "Which?", "options": o, "answer": a} for o, a in forms.values()]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "in.parquet")
    for path in (rows(tmp_path / "in.jsonl", *made), str(tmp_path / "in.parquet")):
        source = open_records(path)
        found = list(source)
        assert [(r.options, r.answer) for r in found if isinstance(r, Record)] == [
            ((*TEXTS, "?") if "more" in form else tuple(TEXTS), "B") for form in forms
        ]
        out = tmp_path / f"out{source.suffix}"
        with RecordWriter(out, source) as writer:
            for record in found:
                assert isinstance(record, Record)
                writer.write(record, "C")
        answers = [r.answer for r in open_records(str(out)) if isinstance(r, Record)]
        assert answers == ["C"] * len(forms)


def test_a_map_in_parquet_is_an_object_of_labels(tmp_path: Path) -> None:
    kinds = {"question": pa.string(), "options": pa.map_(pa.string(), pa.string())}
    options = [list(zip("xyz", TEXTS, strict=True)), list(zip("xx", TEXTS, strict=False))]
    made = [{"question": "Which?", "options": o, "answer": "y"} for o in options]
    table = pa.Table.from_pylist(made, schema=pa.schema({**kinds, "answer": pa.string()}))
    pq.write_table(table, tmp_path / "in.parquet")
    source = open_records(str(tmp_path / "in.parquet"))
    record, reject = source
    assert isinstance(record, Record)
    assert isinstance(reject, Reject)
    assert (record.options, record.answer) == (tuple(TEXTS), "B")
    assert "expected different labels, found x, x" in reject.reason
    with RecordWriter(tmp_path / "out.parquet", source) as writer:
        writer.write(record, "C")
    written = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert written == [{**made[0], "answer": "z"}]


def test_questions_as_arc_publishes_them(tmp_path: Path) -> None:
    row = {"id": "q", "question": {"stem": "Which?", "choices": LABELLED}, "answerKey": "B"}
    path = rows(tmp_path / "in.jsonl", row)
    record = next(iter(open_records(path)))
    assert isinstance(record, Record)
    assert (record.question, record.options, record.answer) == ("Which?", tuple(TEXTS), "B")
    assert written(tmp_path, path, "A") == {**row, "answerKey": "A"}


@pytest.mark.parametrize(
    ("options", "answer", "said"),
    [
        # "0" would be an index, "1" to "3" are labels: two answers would mean one option.
        (called("id", "text", (1, 2, 3)), 0, "one of the labels 1, 2, 3"),
        (called("id", "text", "BAC"), "(b)", "found '(b)'"),
        (called("id", "text", "AAA"), "A", "expected different labels, found A, A, A"),
        (called("id", "text", key="A"), "A", "expected text"),
        (LABELLED[0], "A", "expected a list, found text"),
        ({"label": None, "text": TEXTS}, "A", "expected a list, found nothing (null)"),
        ({"label": list("ABC"), "text": None}, "A", "expected a list, found nothing (null)"),
        (["A. apple", "C. stone", "B. car"], "stone", "found 'stone'"),
        (TEXTS, "A. stone", "found 'A. stone'"),
    ],
)
def test_what_could_mean_two_options_is_refused(
    tmp_path: Path, options: Any, answer: Any, said: str
) -> None:
    path = rows(tmp_path / "in.jsonl", {"question": "Which?", "options": options, "answer": answer})
    with pytest.raises(UserError, match="the only record was rejected") as refused:
        open_records(path)
    assert said in str(refused.value)


def test_an_answer_within_another_field_cannot_be_written_and_is_no_schema(tmp_path: Path) -> None:
    path = rows(tmp_path / "in.jsonl", {"question": "Which?", "reply": {"text": "stone"}})
    with pytest.raises(UserError, match=r"needs the fields question\+reply\.text"):
        open_records(path, schema="qa:question,reply.text")


@pytest.mark.parametrize(
    ("schema", "row"),
    [
        ("qa:question,reply.text", {"question": "Which?", "reply.text": "car"}),
        (
            "choice:question,options,reply.text",
            {"question": "Which?", "options": TEXTS, "reply.text": "car"},
        ),
        (
            "messages:reply.text",
            {"reply.text": [{"role": r, "content": "?"} for r in ("user", "assistant")]},
        ),
    ],
)
def test_an_answer_within_another_field_of_a_stray_row_is_rejected(
    tmp_path: Path, schema: str, row: dict[str, Any]
) -> None:
    stray = {**row, "reply": {"text": row["reply.text"]}}
    del stray["reply.text"]
    _, second = open_records(rows(tmp_path / "in.jsonl", row, stray), schema=schema)
    assert isinstance(second, Reject)
    assert "missing field 'reply.text'" in second.reason
