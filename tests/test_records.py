"""Every format and schema, read and written: what goes in comes out, and nothing else changes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustft.errors import UserError
from robustft.records import (
    Record,
    RecordSource,
    RecordWriter,
    Reject,
    open_records,
    output_name,
)
from robustft.records.formats import BadRowError
from robustft.records.ids import UniqueIds

CHOICE = [
    {"id": "a", "question": "2+2?", "options": ["3", "4"], "answer": "B", "gt": "never read"},
    {"id": "b", "question": "Sky?", "options": ["blue", "red", "green"], "answer": "A", "gt": None},
]


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def save(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def records(source: RecordSource) -> list[Record]:
    items = list(source)
    assert not [item for item in items if isinstance(item, Reject)]
    return [item for item in items if isinstance(item, Record)]


def rewrite(source: RecordSource, out: Path, answers: dict[int, str] | None = None) -> bytes:
    with RecordWriter(out, source) as writer:
        for item in source:
            if isinstance(item, Record):
                writer.write(item, (answers or {}).get(item.index, item.answer))
    return out.read_bytes()


def test_choice_jsonl(tmp_path: Path) -> None:
    source = open_records(save(tmp_path / "d.jsonl", jsonl(CHOICE)))
    first, second = records(source)
    assert (source.format, source.schema, source.suffix) == ("jsonl", "choice", ".jsonl")
    assert source.fields == ("id", "question", "options", "answer", "gt")
    assert (first.index, first.line, first.id) == (0, 1, "a")
    assert (first.question, first.options, first.answer) == ("2+2?", ("3", "4"), "B")
    assert first.context == ()
    assert first.row == CHOICE[0]
    assert (second.index, second.line, second.answer) == (1, 2, "A")
    assert records(source) == [first, second], "a source can be read again"


def test_unchanged_rows_keep_every_byte(tmp_path: Path) -> None:
    data = (
        b'{ "question" : "caf\\u00e9" ,"answer":"x", "n": 1.10, "big": 123456789012345678901234,'
        b' "a":1,"a":2}\r\n\n  {"question":"\xe2\x80\xa8?","answer":"y"}'
    )
    source = open_records(save(tmp_path / "d.jsonl", data))
    out = rewrite(source, tmp_path / "o.jsonl")
    assert out.split(b"\n") == [line.strip() for line in data.split(b"\n") if line] + [b""]
    changed = rewrite(source, tmp_path / "o.jsonl", {0: "z"}).split(b"\n")
    assert json.loads(changed[0]) == json.loads(data.split(b"\n")[0]) | {"answer": "z"}


def test_json_array_streams_and_round_trips(tmp_path: Path) -> None:
    rows = [{"question": f'q{i} "[,]}}" \\', "answer": "x" * 300_000} for i in range(3)]
    for text in (json.dumps(rows), json.dumps(rows, indent=1), f" \n{json.dumps(rows)}\n "):
        source = open_records(save(tmp_path / "d.json", text.encode()))
        assert source.format == "json"
        assert [(r.index, r.line, dict(r.row)) for r in records(source)] == [
            (i, i + 1, row) for i, row in enumerate(rows)
        ]
        assert json.loads(rewrite(source, tmp_path / "o.json")) == rows
        changed = json.loads(rewrite(source, tmp_path / "o.json", {1: "new"}))
        assert changed == [rows[0], rows[1] | {"answer": "new"}, rows[2]]


def test_json_name_with_one_object_a_line(tmp_path: Path) -> None:
    source = open_records(save(tmp_path / "d.json", jsonl(CHOICE)))
    assert (source.format, output_name(source)) == ("jsonl", "cleaned.json")
    assert len(records(source)) == 2


def test_csv_round_trip_and_change(tmp_path: Path) -> None:
    data = (
        b"\xef\xbb\xbfid,question,answer,options,note\r\n"
        b'7,"two\nlines, ""quoted""",b,"[""x"", ""y"", ""z""]",  kept \r\n'
        b"\r\n"
        b'8,plain,C,"[""x"", ""y"", ""z""]",\r\n'
    )
    source = open_records(save(tmp_path / "d.csv", data))
    first, second = records(source)
    assert source.fields == ("id", "question", "answer", "options", "note")
    assert (first.question, first.answer, first.line) == ('two\nlines, "quoted"', "B", 2)
    assert (second.id, second.line, second.row["note"]) == ("8", 5, "")
    assert rewrite(source, tmp_path / "o.csv") == data.replace(b"\r\n\r\n", b"\r\n")
    rewrite(source, tmp_path / "o.csv", {0: "C"})
    first_again, second_again = records(open_records(str(tmp_path / "o.csv")))
    assert first_again.row == {**first.row, "answer": "c"}, "the given letter's case is kept"
    assert second_again.row == second.row


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_compressed(tmp_path: Path, name: str, suffix: str) -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5000)]
    if name == "d.csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["question", "answer"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        plain = text.getvalue().encode()
    else:
        plain = (
            jsonl(rows) if name == "d.jsonl" else b"[" + b",".join(map(orjson.dumps, rows)) + b"]"
        )
    codec = "gzip" if suffix == ".gz" else "zstd"
    data = pa.compress(plain, codec=codec, asbytes=True)
    source = open_records(save(tmp_path / f"{name}{suffix}", data))
    assert [dict(r.row) for r in records(source)] == rows
    assert output_name(source) == f"cleaned{name[1:]}{suffix}"
    again = tmp_path / output_name(source)
    written = rewrite(source, again, {1: "new"})
    assert rewrite(source, again, {1: "new"}) == written, "neither time nor name stands in it"
    expected = [row["answer"] for row in rows]
    expected[1] = "new"
    assert [r.answer for r in records(open_records(str(again)))] == expected


def test_gzip_members_one_after_another(tmp_path: Path) -> None:
    data = gzip.compress(jsonl(CHOICE[:1]), mtime=0) + gzip.compress(jsonl(CHOICE[1:]), mtime=0)
    assert len(records(open_records(save(tmp_path / "d.jsonl.gz", data)))) == 2


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4", "weight": 1},
]
SHAREGPT = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
CONTEXT = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))


@pytest.mark.parametrize(
    ("schema", "row", "question", "context", "changed"),
    [
        ("qa", {"question": "2+2?", "answer": "4"}, "2+2?", (), {"answer": "5"}),
        ("qa", {"question": "2+2?", "answer": 4}, "2+2?", (), {"answer": 5}),
        ("alpaca", {"instruction": "Add", "input": "2+2", "output": "4"}, "Add\n\n2+2", (),
         {"output": "5"}),
        ("alpaca", {"instruction": "Add", "input": "", "output": "4"}, "Add", (), {"output": "5"}),
        ("alpaca", {"instruction": "Add", "output": "4"}, "Add", (), {"output": "5"}),
        ("prompt-completion", {"prompt": "2+2?", "completion": "4"}, "2+2?", (),
         {"completion": "5"}),
        ("messages", {"messages": MESSAGES}, "2+2?", CONTEXT,
         {"messages": [*MESSAGES[:-1], MESSAGES[-1] | {"content": "5"}]}),
        ("sharegpt", {"conversations": SHAREGPT}, "2+2?", (),
         {"conversations": [SHAREGPT[0], {"from": "gpt", "value": "5"}]}),
    ],
)  # fmt: skip
def test_open_schemas(
    tmp_path: Path, schema: str, row: dict[str, Any], question: str, context: Any, changed: Any
) -> None:
    row = {"other": [1, None, {"deep": True}], **row}
    source = open_records(save(tmp_path / "d.jsonl", jsonl([row])))
    (record,) = records(source)
    assert source.schema == schema
    assert (record.question, record.options, record.answer) == (question, None, "4")
    assert record.context == context
    assert json.loads(rewrite(source, tmp_path / "o.jsonl", {0: "5"})) == row | changed
    named = open_records(str(tmp_path / "d.jsonl"), schema=schema)
    assert named.schema == schema


@pytest.mark.parametrize(
    ("given", "answer", "written"),
    [
        (12, "13", 13), (12, "+13", 13), (12, "12.5", 12.5), (12, "1e3", 1000.0), (1.5, "2", 2.0),
        (12, "1e400", "1e400"), (12, "1_000", "1_000"), (1.5, "1_000", "1_000"),
        (12, "infinity", "infinity"), (1.5, "nan", "nan"),
        (12, "1" * 200_000 + "x", "1" * 200_000 + "x"),
        (12, "1/3", "1/3"), (12, "\u0661", "\u0661"),
        (12, "9" * 5000, "9" * 5000), (12, "9" * 30, int("9" * 30)), ("12", "13", "13"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_numbers_where_they_are_plain_and_finite(
    tmp_path: Path, given: Any, answer: str, written: Any
) -> None:
    row = {"question": "?", "answer": given}
    source = open_records(save(tmp_path / "d.jsonl", json.dumps(row).encode()))
    out = json.loads(rewrite(source, tmp_path / "o.jsonl", {0: answer}))
    assert out == row | {"answer": written}
    assert type(out["answer"]) is type(written)


def test_chat_turns_in_a_csv_cell(tmp_path: Path) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("id", "messages"), ("a", json.dumps(MESSAGES))])
    source = open_records(save(tmp_path / "d.csv", text.getvalue().encode()))
    (record,) = records(source)
    assert (source.schema, record.answer, record.context) == ("messages", "4", CONTEXT)
    rewrite(source, tmp_path / "o.csv", {0: "5"})
    (again,) = records(open_records(str(tmp_path / "o.csv")))
    assert json.loads(again.row["messages"]) == [*MESSAGES[:-1], MESSAGES[-1] | {"content": "5"}]


def test_json_in_a_csv_cell_keeps_long_numbers_and_depth(tmp_path: Path) -> None:
    deep = json.loads("[" * 300 + "]" * 300)
    turns = [*MESSAGES[:-1], MESSAGES[-1] | {"number": 2**70, "deep": deep}]
    text = io.StringIO()
    csv.writer(text).writerows([["messages"], [json.dumps(turns)]])
    source = open_records(save(tmp_path / "d.csv", text.getvalue().encode()))
    rewrite(source, tmp_path / "o.csv", {0: "5"})
    (again,) = records(open_records(str(tmp_path / "o.csv")))
    assert json.loads(again.row["messages"])[-1] == turns[-1] | {"content": "5"}


ARC = {"text": ["up", "down"], "label": ["1", "2"]}


@pytest.mark.parametrize(
    ("options", "answer", "letter", "other", "written"),
    [
        (["up", "down"], "A", "A", "B", "B"),
        (["up", "down"], "(a)", "A", "B", "(b)"),
        (["up", "down"], "B.", "B", "A", "A."),
        (["up", "down"], "down", "B", "A", "up"),
        (["up", "down"], 1, "B", "A", 0),
        (["a", "the"], "the", "B", "A", "a"),
        (["the", "a"], "a", "B", "A", "the"),
        (["B", "A"], "B", "B", "A", "A"),
        ([3, 4.5], "B", "B", "A", "A"),
        ('["up", "down"]', "B", "B", "A", "A"),
        (ARC, "2", "B", "A", "1"),
        (ARC, 2, "B", "A", 1),
        ({"text": ["up", "down"], "label": ["x", "2"]}, 2, "B", "A", "x"),
        (ARC, 2.0, "B", "A", 1.0),
        ([{"label": "1", "text": "up"}, {"label": "2", "text": "down"}], "2", "B", "A", "1"),
        ({"None": "up", "Some": "down"}, "down", "B", "A", "up"),
        ({"None": "up", "Some": "down"}, "None", "A", "B", "Some"),
        ({"A": "up", "B": "down"}, "B", "B", "A", "A"),
        ({"A": "up", "B": "down"}, "down", "B", "A", "up"),
        ({"A": "up", "B": "down", "C": None}, "B", "B", "A", "A"),
    ],
)
def test_choice_answers_keep_their_form(
    tmp_path: Path, options: Any, answer: Any, letter: str, other: str, written: Any
) -> None:
    row = {"question": "?", "choices": options, "answerKey": answer}
    source = open_records(save(tmp_path / "d.jsonl", jsonl([row])))
    (record,) = records(source)
    assert (source.schema, record.answer) == ("choice", letter)
    out = json.loads(rewrite(source, tmp_path / "o.jsonl", {0: other}))
    assert out == row | {"answerKey": written}
    assert type(out["answerKey"]) is type(written)


def test_no_answer_is_the_option_called_none_but_its_own(tmp_path: Path) -> None:
    rows = [
        {"question": "?", "options": {"None": "up", "Some": "down"}, "answer": answer}
        for answer in ("sideways", "None")
    ]
    found = list(open_records(save(tmp_path / "d.jsonl", jsonl(rows))))
    assert isinstance(found[0], Reject)
    assert "found 'sideways'" in found[0].reason
    assert isinstance(found[1], Record)
    assert found[1].answer == "A"


def test_options_may_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    """As in MMLU's files; a shorter question leaves the last ones empty."""
    source = tmp_path / "in.csv"
    source.write_text("question,A,B,C,D,answer\n2+2?,3,4,5,6,B\nSky?,blue,red,,,A\nNo?,x,,,,A\n")
    found = list(open_records(str(source)))
    first, second, third = found
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert (first.options, first.answer) == (("3", "4", "5", "6"), "B")
    assert (second.options, second.answer) == (("blue", "red"), "A")
    assert isinstance(third, Reject)
    assert third.reason == "empty option (field 'B')"
    schema = open_records(str(source)).layout
    row = {"question": "2+2?", "A": "3", "B": "4", "answer": "A"}
    assert schema.changes(row, "B") == {"answer": "B"}


@pytest.mark.parametrize(
    ("answers", "options", "letters"),
    [
        ("012", ["7", "8", "9"], "ABC"),
        ("123", ["7", "8", "9"], "ABC"),
        (("0.0", "1.0", "2.0"), ["7", "8", "9"], "ABC"),
        (("7.0", "8.0", "2.0"), ["7.0", "8.0", "2.0"], "ABC"),
        ("789", ["7", "8", "9"], "ABC"),
        ("201", ["2", "1", "0"], "CAB"),
    ],
)
def test_digits_in_text_are_read_alike_in_the_whole_file(
    tmp_path: Path, answers: Sequence[str], options: list[str], letters: str
) -> None:
    lines = [f'q,{answer},"{json.dumps(options)}"'.replace('"', '""') for answer in answers]
    lines = [line.replace('""[', '"[', 1)[:-1] for line in lines]
    data = "question,answer,options\n" + "\n".join(lines)
    source = open_records(save(tmp_path / "d.csv", data.encode()))
    assert "".join(record.answer for record in records(source)) == letters
    rewrite(source, tmp_path / "o.csv", {0: letters[1]})
    again = records(open_records(str(tmp_path / "o.csv")))
    assert again[0].row["answer"] == answers[1]


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv", "in.parquet"])
def test_indexes_beside_missing_answers(tmp_path: Path, name: str) -> None:
    """pandas makes floats of a column of whole numbers that has a null."""
    answers = [0.0, None, 2.0]
    rows = [{"question": "?", "options": '["7", "8", "9"]', "answer": one} for one in answers]
    path = tmp_path / name
    if name == "in.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name == "in.csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([rows[0].keys(), *(row.values() for row in rows)])
    else:
        path.write_bytes(jsonl(rows))
    source = open_records(str(path))
    first, missing, last = source
    assert isinstance(first, Record)
    assert isinstance(missing, Reject)
    assert isinstance(last, Record)
    assert (first.answer, last.answer) == ("A", "C")
    with RecordWriter(tmp_path / f"out{path.suffix}", source) as writer:
        writer.write(first, "C")
        writer.write(last, "A")
    again = [
        one.row["answer"] for one in records(open_records(str(tmp_path / f"out{path.suffix}")))
    ]
    assert again == (["2.0", "0.0"] if name == "in.csv" else [2.0, 0.0])
    assert {type(one) for one in again} == {str if name == "in.csv" else float}


def test_keys_tell_content_apart(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "question": "q", "options": ["x", "y"], "answer": "A"},
        {"id": 2, "question": "q", "options": ["x", "y"], "answer": "A", "gt": "B"},
        {"id": 3, "question": "q", "options": ["x", "y"], "answer": "B"},
        {"id": 4, "question": "qx", "options": ["", "y"], "answer": "A"},
        {"id": 5, "question": "q", "options": ["x", "y", ""], "answer": "A"},
    ]
    found = records(open_records(save(tmp_path / "d.jsonl", jsonl(rows))))
    assert {len(record.key) for record in found} == {len(record.question_key) for record in found}
    assert len(found[0].key) == 16
    assert found[0].key == found[1].key
    assert len({record.key for record in found}) == 4
    assert found[0].question_key == found[2].question_key
    assert len({record.question_key for record in found}) == 3


@pytest.mark.parametrize("options", [["x", "Y"], ["y", "x"]])
def test_copies_that_differ_in_little_ask_the_same(tmp_path: Path, options: list[str]) -> None:
    rows = [
        {"question": question, "options": shown, "answer": "A"}
        for question, shown in (
            ("Is it so?", ["x", "y"]), ("is  it so? ", options), ("Isit so?", ["x", "y"])
        )
    ]  # fmt: skip
    found = records(open_records(save(tmp_path / "d.jsonl", jsonl(rows))))
    assert found[0].question_key == found[1].question_key != found[2].question_key
    assert len({record.key for record in found}) == 3


def test_duplicate_ids_get_a_number(tmp_path: Path) -> None:
    ids: list[Any] = [None, "a", "a", "a#2", "a", 7, "7", "0", 7.5, "", "8"]
    rows = [{"id": own, "question": "q", "answer": "a"} for own in ids]
    source = open_records(save(tmp_path / "d.jsonl", jsonl(rows)))
    found = [record.id for record in records(source)]
    expected = ["0", "a", "a#2", "a#2#2", "a#3", "7", "7#2", "0#2", "8", "9", "8#2"]
    assert found == expected


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["", "0", "1", "2", "3", "x", "x#2", "0#2"]), min_size=1))
def test_ids_are_unique(tmp_path: Path, ids: list[str]) -> None:
    rows = [{"id": own, "question": "q", "answer": "a"} for own in ids]
    found = records(open_records(save(tmp_path / "d.jsonl", jsonl(rows))))
    assert len({record.id for record in found}) == len(ids)


def test_many_ids_stay_unique(tmp_path: Path) -> None:
    rows = [{"id": f"id{n % 3000}", "question": "q", "answer": "a"} for n in range(4000)]
    source = open_records(save(tmp_path / "d.jsonl", jsonl(rows)))
    found = records(source)
    assert len({record.id for record in found}) == 4000
    assert [r.id for r in found[:3000]] == [row["id"] for row in rows[:3000]]


def test_ids_that_stand_twice_or_always_take_no_more_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, looks = 6_000, 0
    for name in (lambda n: f"a rather long name {n // 2}", lambda n: "one name"):
        ids = UniqueIds()
        tracemalloc.start()
        for number in range(count):
            ids.unique(name(number), number)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held < 33 * count
    look = UniqueIds._slot

    def counted(self: UniqueIds, value: int) -> int:
        nonlocal looks
        looks += 1
        return look(self, value)

    monkeypatch.setattr(UniqueIds, "_slot", counted)
    ids.unique("one name", count)
    assert looks < 50


def test_limit_counts_readable_records(tmp_path: Path) -> None:
    data = jsonl(CHOICE[:1]) + b"broken\n" + jsonl(CHOICE[1:]) + jsonl(CHOICE)
    source = open_records(save(tmp_path / "d.jsonl", data), limit=2)
    kinds = [type(item) for item in source]
    assert kinds == [Record, Reject, Record]


def test_schema_by_majority_and_by_name(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a"}] * 3 + [
        {"question": "q", "answer": "A", "options": []}
    ]
    path = save(tmp_path / "d.jsonl", jsonl(rows))
    assert open_records(path).schema == "qa"
    both = [{"question": "q", "answer": "B", "options": ["x", "y"]}]
    path = save(tmp_path / "e.jsonl", jsonl(both))
    assert open_records(path).schema == "choice"
    assert records(open_records(path, schema="qa"))[0].options is None


@pytest.mark.parametrize(
    ("schema", "row", "read", "answer", "changed"),
    [
        ("qa:Frage,Antwort", {"Frage": "a?", "Antwort": "b"}, ("a?", None, "b"), "c", "Antwort"),
        ("qa:Frage, Antwort", {"Frage": "a?", "Antwort": "b"}, ("a?", None, "b"), "c", "Antwort"),
        ("qa:Q, A ", {"Q": "a?", " A ": "b"}, ("a?", None, "b"), "c", " A "),
        (
            "qa:Question, in full, Label,s", {"Question, in full": "a?", "Label,s": "b"},
            ("a?", None, "b"), "c", "Label,s",
        ),
        ("prompt-completion:x,y", {"x": "a?", "y": 1}, ("a?", None, "1"), "2", "y"),
        ("alpaca:do,say", {"do": "a?", "input": "i", "say": "b"}, ("a?", None, "b"), "c", "say"),
        ("alpaca:do,on,to", {"do": "a?", "on": "i", "to": "b"}, ("a?\n\ni", None, "b"), "c", "to"),
        (
            "alpaca:instruction,input,output", {"instruction": "a?", "input": "", "output": "b"},
            ("a?", None, "b"), "c", "output",
        ),
        ("choice:Q,O,L", {"Q": "a?", "O": ["x", "y"], "L": 1}, ("a?", ("x", "y"), "B"), "A", "L"),
        ("choice:Q,L", {"Q": "?", "A": "x", "B": "y", "L": "a"}, ("?", ("x", "y"), "A"), "B", "L"),
        (
            "messages:turns",
            {"turns": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]},
            ("a?", None, "b"), "c", "turns",
        ),
        (
            "sharegpt:talk",
            {"talk": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
            ("a?", None, "b"), "c", "talk",
        ),
    ],
)  # fmt: skip
def test_fields_of_other_names(
    tmp_path: Path, schema: str, row: dict[str, Any], read: Any, answer: str, changed: str
) -> None:
    tables = {
        "in.jsonl": jsonl([row | {"gt": "unseen"}] * 3),
        "in.json": orjson.dumps([row | {"gt": "unseen"}] * 3),
    }
    for name, data in tables.items():
        source = open_records(save(tmp_path / name, data), schema=schema)
        assert source.kind == schema.partition(":")[0]
        first = records(source)[0]
        assert (first.question, first.options, first.answer) == read
        out = tmp_path / f"out-{name}"
        rewrite(source, out, {1: answer})
        again = open_records(str(out), schema=source.schema)  # what was written can be read
        assert [one.answer for one in records(again)] == [read[2], answer, read[2]]
        rows = [one.row for one in records(again)]
        assert rows[0] == rows[2] == row | {"gt": "unseen"}
        assert rows[1] == rows[0] | {changed: rows[1][changed]}
    table = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist([row]), table)
    assert records(open_records(str(table), schema=schema))[0].answer == read[2]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("quiz:a,b", "schema: expected one of choice, .* found 'quiz'"),
        ("qa:a", "schema qa: expected 2 different fields, found 'a'"),
        ("qa:", "schema qa: expected 2 different fields, found ''"),
        ("qa:a,a", "schema qa: expected 2 different fields"),
        ("choice:a", "schema choice: expected 2 or 3 different fields"),
        ("messages:a,b", "schema messages: expected 1 field, found"),
        ("qa:question,Label", r"qa:question,Label needs the fields question\+Label; fields found"),
    ],
)
def test_fields_that_are_not_there(tmp_path: Path, schema: str, message: str) -> None:
    path = save(tmp_path / "in.jsonl", jsonl(CHOICE))
    with pytest.raises(UserError, match=message):
        open_records(path, schema=schema)


def test_a_named_field_that_rows_may_leave_out_is_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"do": "a?", "say": "b"}, {"do": "a?", "on": "i", "say": "b"}]
    path = save(tmp_path / "in.jsonl", jsonl(rows))
    open_records(path, schema="alpaca:do,on,say")
    open_records(save(tmp_path / "b.jsonl", b'{"instruction": "a?", "output": "b"}'))
    assert caplog.messages == []
    assert records(open_records(path, schema="alpaca:do,no,say"))[1].question == "a?"
    assert caplog.messages == [
        f"{path}: none of the first records has the field 'no' of the schema; fields found: do, "
        "say, on"
    ]


def test_content_hash_follows_the_bytes(tmp_path: Path) -> None:
    data = jsonl(CHOICE)
    first = open_records(save(tmp_path / "a.jsonl", data)).content_hash
    assert open_records(save(tmp_path / "b.jsonl", data)).content_hash == first
    assert open_records(save(tmp_path / "c.jsonl", data + b" ")).content_hash != first


def test_writer_discards_on_error_and_keeps_what_stood_there(tmp_path: Path) -> None:
    source = open_records(save(tmp_path / "d.jsonl", jsonl(CHOICE)))
    out = tmp_path / "out" / "o.jsonl"
    out.parent.mkdir()
    out.write_text("before")
    broken = replace(records(source)[0], row={"answer": "A"})
    with pytest.raises(BadRowError), RecordWriter(out, source) as writer:
        writer.write(broken, "A")
    assert out.read_text() == "before"
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(ValueError, match="letter A to B"), RecordWriter(out, source) as writer:
        writer.write(records(source)[0], "C")
    with pytest.raises(ValueError, match="not open"):
        RecordWriter(out, source).write(records(source)[0], "A")


def test_writing_nothing_gives_a_valid_empty_file(tmp_path: Path) -> None:
    for name, data, empty in (
        ("d.jsonl", jsonl(CHOICE), b""),
        ("d.json", b"[" + orjson.dumps(CHOICE[0]) + b"]", b"[]\n"),
        ("d.csv", b"question,answer\nq,a\n", b"question,answer\n"),
    ):
        source = open_records(save(tmp_path / name, data))
        with RecordWriter(tmp_path / "out", source):
            pass
        assert (tmp_path / "out").read_bytes() == empty


_CELL = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "question": _CELL.map(lambda cell: cell + "?"),
                "answer": _CELL.map(lambda cell: cell + "!"),
                "x": st.recursive(
                    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | _CELL,
                    lambda inner: st.lists(inner, max_size=3),
                    max_leaves=5,
                ),
            }
        ),
        min_size=1,
        max_size=5,
    )
)  # fmt: skip
def test_any_json_row_survives(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for name, data in (
        ("d.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        ("d.json", json.dumps(rows, ensure_ascii=False)),
    ):
        source = open_records(save(tmp_path / name, data.encode()))
        answers = {i: row["answer"] + "?" for i, row in enumerate(rows)}
        out = rewrite(source, tmp_path / "o", answers).decode()
        found = (
            json.loads(out) if name == "d.json" else [json.loads(r) for r in out.split("\n")[:-1]]
        )
        assert found == [row | {"answer": row["answer"] + "?"} for row in rows]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(_CELL, _CELL, _CELL), min_size=1, max_size=5))
def test_any_csv_row_survives(tmp_path: Path, cells: list[tuple[str, str, str]]) -> None:
    rows = [(f"{q}?", f"{a}!", x) for q, a, x in cells]
    text = io.StringIO()
    csv.writer(text).writerows([("question", "answer", "x"), *rows])
    source = open_records(save(tmp_path / "d.csv", text.getvalue().encode()))
    assert [tuple(record.row.values()) for record in records(source)] == rows
    rewrite(source, tmp_path / "o.csv", {i: row[1] + "!" for i, row in enumerate(rows)})
    again = [tuple(r.row.values()) for r in records(open_records(str(tmp_path / "o.csv")))]
    assert again == [(q, a + "!", x) for q, a, x in rows]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    row = orjson.dumps({"question": "q" * 500, "answer": "a"})
    peaks = []
    for count in (1000, 20_000):
        source = open_records(save(tmp_path / "d.json", b"[" + b",".join([row] * count) + b"]"))
        tracemalloc.start()
        assert sum(1 for _ in source) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2 + 50_000


def test_text_formats_need_no_heavy_import() -> None:
    code = "import sys, robustft.records; print({'pyarrow', 'datasets', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def data_folder() -> Path:
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("ROBUSTFT_DATA", root.parent / "shared" / "data"))
    if not (folder / "arc").is_dir():
        pytest.skip(f"no real corpora in {folder} (set ROBUSTFT_DATA)")
    return folder


@pytest.mark.data
def test_real_corpora(tmp_path: Path) -> None:
    for path in sorted(data_folder().glob("*/*.csv")):
        source = open_records(str(path))
        items = list(source)
        rejects = [item for item in items if isinstance(item, Reject)]
        # One three-option question is flipped to "D" in arc/noisy50; mmlu has bare NaN as options.
        expected = {"arc/noisy50.csv": 1, "mmlu/labeled.csv": 3, "mmlu/test.csv": 1}
        assert len(rejects) == expected.get(f"{path.parent.name}/{path.name}", 0)
        if not rejects:
            assert rewrite(source, tmp_path / "o.csv") == path.read_bytes()
    with pytest.raises(UserError, match="ground_truth"):
        open_records(str(data_folder() / "gsm8k_solutions" / "solutions.jsonl"))


@pytest.mark.parametrize(
    ("answers", "read", "says"),
    [
        ([1, 2, 1], "BCB", "counted from 0, but neither 0 nor the number of options occurs"),
        ([1, 2, 3, 3], "ABCC", None),
        ([0, 2, 1], "ACB", None),
        ([0, 3, 1], "AB", "counted from 0, but both 0 and the number of options occur"),
        ([1.0, 2.0], "BC", "counted from 0, but neither 0 nor the number of options occurs"),
        (["x", 2.0, "1"], "A", None),  # a text; none of them is an index
    ],
)
def test_numbers_that_may_count_from_0_or_1(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    answers: list[Any],
    read: str,
    says: str | None,
) -> None:
    rows = [{"question": "?", "options": ["x", "y", "z"], "answer": one} for one in answers]
    source = open_records(save(tmp_path / "in.jsonl", jsonl(rows)))
    assert "".join(one.answer for one in source if isinstance(one, Record)) == read
    assert [says is not None and says in r.message for r in caplog.records] == [True] * bool(says)
    where = f"{tmp_path / 'in.jsonl'}, field 'answer': "
    assert all(record.message.startswith(where) for record in caplog.records)


def test_labels_are_not_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"label": ["1", "2", "3"], "text": ["x", "y", "z"]}
    rows = [{"question": "?", "choices": options, "answerKey": one} for one in ("1", 2, "2")]
    source = open_records(save(tmp_path / "in.jsonl", jsonl(rows)))
    assert [one.answer for one in records(source)] == ["A", "B", "B"]
    assert caplog.records == []


def test_content_parts_go_in_and_come_out_as_parts(tmp_path: Path) -> None:
    def parts(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    turns = [
        {"role": "user", "content": parts("What is ", "2+2?")},
        {"role": "assistant", "content": parts("5"), "name": "bot"},
    ]
    source = open_records(save(tmp_path / "in.jsonl", jsonl([{"messages": turns, "n": 1}])))
    (record,) = records(source)
    assert (record.question, record.answer) == ("What is 2+2?", "5")
    with RecordWriter(tmp_path / "out.jsonl", source) as writer:
        writer.write(record, "4")
    out = orjson.loads((tmp_path / "out.jsonl").read_bytes())
    assert out == {"messages": [turns[0], {**turns[1], "content": parts("4")}], "n": 1}


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_csv_as_spreadsheets_of_other_countries_write_it(tmp_path: Path, mark: str) -> None:
    bom = b"\xef\xbb\xbf"
    lines = [f"question{mark}answer", f'"Größe{mark} in cm?"{mark}1,5', f"a, b?{mark}x"]
    path = tmp_path / "in.csv"
    path.write_bytes(bom + "".join(f"{line}\r\n" for line in lines).encode())
    source = open_records(str(path))
    first, second = [item for item in source if isinstance(item, Record)]
    assert (first.question, first.answer) == (f"Größe{mark} in cm?", "1,5")
    with RecordWriter(tmp_path / "out.csv", source) as writer:
        writer.write(first, first.answer)
        writer.write(second, f"y{mark}z")
    lines[2] = f'a, b?{mark}"y{mark}z"'
    written = (tmp_path / "out.csv").read_bytes()
    assert written == bom + "".join(f"{line}\r\n" for line in lines).encode()
    (tmp_path / "out.csv").unlink()
    (tmp_path / "later.csv").write_text("question,answer\na,b\n")
    with pytest.raises(UserError, match=r"expected the layout and columns of in\.csv"):
        open_records(str(tmp_path))


def test_a_comma_divides_columns_wherever_it_can(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("question,answer;unit\na;b,c\n")
    source = open_records(str(path), schema="qa:question,answer;unit")
    record = next(iter(source))
    assert isinstance(record, Record)
    assert (record.question, record.answer) == ("a;b", "c")
