"""Input that is wrong in every way issue reports have named: a clear line or a reject, no more.

A `UserError` is one line that names the file; a reject keeps the record's bytes and says why, and
the records around it are read.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustft import records as records_package
from robustft.errors import UserError
from robustft.records import Record, RecordSource, RecordWriter, Reject, framing, open_records

GOOD = {"question": "2+2?", "options": ["3", "4"], "answer": "B"}
LINE = orjson.dumps(GOOD)
RANDOM = random.Random(0)


def save(path: Path, data: bytes | str) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def refused(path: str, **options: Any) -> str:
    """Return the one line with which an input is refused; it names the file."""
    with pytest.raises(UserError) as caught:
        open_records(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert path in message or Path(path).name in message
    return message


def rejected(path: Path, bad: bytes, suffix: str = ".jsonl") -> Reject:
    """Read a bad record between two good ones; return its reject."""
    if suffix == ".json":
        data = b"[" + b",\n".join([LINE, bad, LINE]) + b"]"
    else:
        data = b"\n".join([LINE, bad, LINE, b""])
    items = list(open_records(save(path / f"d{suffix}", data)))
    assert [type(item) for item in items] == [Record, Reject, Record]
    reject = items[1]
    assert isinstance(reject, Reject)
    assert (reject.line, reject.size) == (2, len(bad))
    assert reject.data == bad[: framing.REJECT_BYTES]
    return reject


def test_missing_file(tmp_path: Path) -> None:
    for name in ("d.jsonl", "d.csv", "d.txt", "d", "no/such/folder/d.json"):
        assert "No such file or directory" in refused(str(tmp_path / name))
    with pytest.raises(UserError, match="not a file name"):
        open_records("a\0b")


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    assert refused(save(tmp_path / name, b"")).endswith("the file is empty")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("d.jsonl", b"\n \n"),
        ("d.json", b" \n"),
        ("d.csv", b"\n\n"),
        ("d.jsonl", b"\xef\xbb\xbf"),
        ("d.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("d.jsonl.zst", pa.compress(b"", codec="zstd", asbytes=True)),
    ],
)
def test_empty_file_of_blanks(tmp_path: Path, name: str, data: bytes) -> None:
    assert refused(save(tmp_path / name, data)).endswith("the file is empty")


@pytest.mark.parametrize(
    ("name", "data"), [("d.json", b"[]"), ("d.json", b"[ \n]"), ("d.csv", b"question,answer\n")]
)
def test_file_without_records(tmp_path: Path, name: str, data: bytes) -> None:
    assert refused(save(tmp_path / name, data)).endswith("the file holds no records")
    pq.write_table(pa.table({"question": [], "answer": []}), tmp_path / "d.parquet")
    assert refused(str(tmp_path / "d.parquet")).endswith("the file holds no records")


def test_directory_without_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing here")
    assert "the folder holds no data files" in refused(str(tmp_path))


def test_pipe_or_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d.jsonl")
    assert "cannot be read twice" in refused(str(tmp_path / "d.jsonl"))


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "d.jsonl", LINE)
    (tmp_path / "d.jsonl").chmod(0)
    if os.access(path, os.R_OK):  # the superuser reads everything

        def deny(self: Path, *args: object, **options: object) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "open", deny)
    assert "Permission denied" in refused(path)


@pytest.mark.parametrize("name", ["d.txt", "d.tab", "d", "d.gz", "d.jsonl.bz2", "d.parquet.gz"])
def test_wrong_extension(tmp_path: Path, name: str) -> None:
    message = refused(save(tmp_path / name, LINE))
    assert "unknown extension" in message
    assert ".jsonl .ndjson .json .csv .tsv (also with .gz or .zst) and .parquet" in message


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "d.csv",
            gzip.compress(LINE, mtime=0),
            "expected plain text as the name says, found gzip data",
        ),
        ("d.jsonl.gz", LINE, "expected gzip as the name says, found other data"),
        ("d.jsonl.gz", b"\x28\xb5\x2f\xfd", "expected gzip as the name says, found zstd data"),
        ("d.jsonl", b"PAR1", "expected plain text as the name says, found Parquet data"),
        ("d.parquet", LINE, "expected Parquet as the name says, found other data"),
        ("d.parquet", b"PAR1 and no more", "not a readable Parquet file"),
        ("d.csv", "question,answer\n".encode("utf-16"), "expected UTF-8, found UTF-16"),
        ("d.jsonl.gz", b"\x1f\x8b rubbish", "not one byte can be decompressed"),
        ("d.json", json.dumps(GOOD, indent=1), "expected an array of objects or one a line"),
        ("d.csv", 'question,"answer\nq,a\n', "line 1: expected a CSV header, found: broken CSV"),
        ("d.csv", b"question,\xff\nq,a\n", "line 1: expected a CSV header, found: not valid UTF-8"),
        ("d.csv", b"question,answer,answer\nq,a,b\n", "line 1: the column 'answer' appears twice"),
    ],
)
def test_content_that_is_not_what_the_name_says(
    tmp_path: Path, name: str, data: bytes | str, message: str
) -> None:
    assert message in refused(save(tmp_path / name, data))


def test_unknown_schema(tmp_path: Path) -> None:
    path = save(tmp_path / "d.jsonl", b'{"title": "t", "body": "b", "gt": "x"}\n')
    message = refused(path)
    assert "no known schema has these fields: title, body, gt" in message
    assert "choice (question, options, answer)" in message
    assert "sharegpt (conversations)" in message
    with pytest.raises(
        UserError, match=r"schema: expected one of choice, messages, .* found 'quiz'"
    ):
        open_records(path, schema="quiz")


def test_missing_field(tmp_path: Path) -> None:
    reject = rejected(tmp_path, b'{"question": "q", "answer": "A"}')
    assert reject.reason == "missing field 'options'; fields found: question, answer"
    path = save(tmp_path / "d.csv", "question,reply\nq,a\n")
    message = refused(path, schema="qa")
    assert "schema qa needs the fields question+answer; fields found: question, reply" in message


def test_reasons_stay_short_whatever_the_names(tmp_path: Path) -> None:
    wide = {f"{n} " + "n" * 100_000: 1 for n in range(30)}
    reject = rejected(tmp_path, orjson.dumps(wide))
    assert reject.reason.startswith("missing field 'question'; fields found: 0 nnn")
    assert len(reject.reason) < 1400
    roles = [{"role": "x" * 100_000, "content": "q"}]
    for number, row in enumerate([wide, {"messages": roles}, {"q" * 100_000: 1}]):
        assert len(refused(save(tmp_path / f"{number}.jsonl", orjson.dumps(row)))) < 2500
    assert len(framing.reject(1, "x" * 100_000, b"").reason) == framing.REASON_CHARACTERS
    for header in (f"{'n' * 100_000},b,b", f"{'n' * 100_000},{'n' * 100_000}"):
        assert len(refused(save(tmp_path / "d.csv", header + "\nq,a,b\n"))) < 500


def test_another_header_is_told_in_a_short_line(tmp_path: Path) -> None:
    source = open_records(save(tmp_path / "d.csv", f"question,answer,{'n' * 100_000}\nq,a,b\n"))
    save(tmp_path / "d.csv", "question,answer\nq,a\n")
    with pytest.raises(UserError, match=r"n\.\.\., found question, answer$") as told:
        list(source)
    assert len(str(told.value)) < 500


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"options": "x|y"}, "field 'options': expected a JSON list, found 'x|y'"),
        ({"options": "['x', 'y']"}, "which is Python's notation: json.dumps writes JSON"),
        ({"options": "3"}, "field 'options': expected a list, found a number"),
        ({"options": None}, "field 'options': expected a list, found nothing (null)"),
        ({"options": ["x", None]}, "field 'options': expected text, found nothing (null)"),
        ({"options": ["x", ["y"]]}, "field 'options': expected text, found a list"),
        ({"options": '["x", NaN]'}, "found '[\"x\", NaN]' with NaN, which is no JSON"),
        ({"options": {"text": ["x", "y"], "label": ["A"]}}, "2 options but 1 labels"),
        ({"options": {"text": ["x", "y"], "label": "AB"}}, "expected a list"),
        ({"options": []}, "field 'options': expected 2 to 26 options, found 0"),
        ({"options": ["x"]}, "field 'options': expected 2 to 26 options, found 1"),
        ({"options": ["x"] * 27}, "field 'options': expected 2 to 26 options, found 27"),
        ({"answer": "C"}, "expected a letter A to B or the text of an option, found 'C'"),
        ({"answer": "perhaps"}, "field 'answer': expected a letter A to B or the text"),
        ({"answer": 2}, "field 'answer': expected an index from 0 to 1, found 2"),
        ({"answer": -1}, "field 'answer': expected an index from 0 to 1, found -1"),
        ({"answer": True}, "field 'answer': expected text, found true or false"),
        ({"answer": None}, "field 'answer': expected text, found nothing (null)"),
        ({"answer": ["B"]}, "field 'answer': expected text, found a list"),
        ({"answer": " "}, "empty answer (field 'answer')"),
        ({"question": "\t"}, "empty question (field 'question')"),
        ({"question": {"a": 1}}, "field 'question': expected text, found an object"),
        ({"question": "a\0b"}, "field 'question': contains a NUL character"),
    ],
)
def test_field_of_the_wrong_kind(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    assert reason in rejected(tmp_path, orjson.dumps(GOOD | change)).reason


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("hello", "expected a JSON list, found 'hello'"),
        ({"role": "user"}, "expected a list, found an object"),
        ([], "expected the assistant's message in the last place, found nothing"),
        ([{"role": "user", "content": "q"}], "in the last place, found the user's"),
        ([{"role": "assistant", "content": "a"}], "in the second last place, found nothing"),
        ([{"role": "wizard", "content": "a"}], "'messages[0]': expected the role system, user or"),
        ([{"role": "user"}], "missing field 'content'; fields found: role"),
        ([{"content": "q"}], "missing field 'role'; fields found: content"),
        (["q"], "field 'messages[0]': expected an object, found text"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "'messages[0].content': expected text, found a list",
        ),
        (
            [{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}],
            "empty question",
        ),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}], "empty answer"),
    ],
)
def test_chat_turns_of_the_wrong_kind(tmp_path: Path, turns: Any, reason: str) -> None:
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": good}, {"messages": turns}]
    data = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    record, reject = open_records(save(tmp_path / "d.jsonl", data))
    assert isinstance(record, Record)
    assert isinstance(reject, Reject)
    assert reason in reject.reason


DEEP = 100_000


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param(b'{"question": "\xff"}', "not valid UTF-8: byte 0xff at offset 14", id="utf8"),
        pytest.param(b'{"question": "a\0b"}', "NUL byte at offset 15", id="NUL"),
        pytest.param(b'{"a": NaN}', "NaN and Infinity are no JSON numbers", id="NaN"),
        pytest.param(b'{"a": [1, -Infinity]}', "NaN and Infinity are no", id="infinity"),
        pytest.param(rb'{"question": "\ud800"}', "no low surrogate", id="lone surrogate"),
        pytest.param(b"[" * DEEP + b"]" * DEEP, "nested too deeply", id="nested 100,000 deep"),
        pytest.param(b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested too deeply", id="objects deep"),
        pytest.param(b"[1]", "expected a JSON object, found a list", id="list"),
        pytest.param(b"7", "expected a JSON object, found a number", id="number"),
        pytest.param(b'{"question": "q" "x"}', "not valid JSON", id="no JSON"),
        pytest.param(b'{"question": "q"; "a"}', "expected ',' or '}' at character 17", id="where"),
        pytest.param(b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON", id="endless number"),
    ],
)
def test_bad_json(tmp_path: Path, suffix: str, bad: bytes, reason: str) -> None:
    assert reason in rejected(tmp_path, bad, suffix).reason


@pytest.mark.parametrize("more", [b"", b', "big": 123456789012345678901234567890'])
def test_what_is_nested_deeply_is_written_or_rejected(tmp_path: Path, more: bytes) -> None:
    for depth, kinds in ((499, [Record, Record]), (500, [Record, Reject])):
        nested = b'{"question": "q", "answer": "a", "x": ' + b"[" * depth + b"]" * depth
        data = orjson.dumps({"question": "[" * 600, "answer": "a"})
        source = open_records(save(tmp_path / "d.jsonl", data + b"\n" + nested + more + b"}\n"))
        items = list(source)
        assert [type(item) for item in items] == kinds
        with RecordWriter(tmp_path / "o.jsonl", source) as writer:
            for item in items:
                if isinstance(item, Record):
                    writer.write(item, "b")
    assert "at most 500 levels" in items[1].reason


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_ten_megabyte_line(tmp_path: Path, suffix: str) -> None:
    bad = b'{"question": "' + b"q" * 10_000_000 + b'"}'
    assert rejected(tmp_path, bad, suffix).reason == "longer than 8388608 bytes"


def test_ten_megabyte_line_without_an_end(tmp_path: Path) -> None:
    data = LINE + b"\n" + b"x" * 10_000_000
    items = list(open_records(save(tmp_path / "d.jsonl", data)))
    assert [type(item) for item in items] == [Record, Reject]
    assert items[1].size == 10_000_000


@pytest.mark.parametrize(
    ("tail", "reason", "records"),
    [
        (b"," + LINE, "the array is not closed", 1),
        (b', {"question": "q', "the array is not closed", 1),
        (b"," + LINE + b"] [1]", "text after the end of the array", 2),
        (b",,", "not valid JSON", 1),
        (b", {]" + b"," + LINE + b"]", "not valid JSON", 1),
    ],
)
def test_broken_json_array(tmp_path: Path, tail: bytes, reason: str, records: int) -> None:
    items = list(open_records(save(tmp_path / "d.json", b"[" + LINE + tail)))
    assert [type(item) for item in items[:records]] == [Record] * records
    assert isinstance(items[records], Reject)
    assert reason in items[records].reason


def test_one_record(tmp_path: Path) -> None:
    (record,) = open_records(save(tmp_path / "d.json", b"[" + LINE + b"]"))
    assert isinstance(record, Record)
    assert "the only record was rejected; line 1: not valid" in refused(
        save(tmp_path / "d.jsonl", b"{oops}\n")
    )


def test_every_record_rejected(tmp_path: Path) -> None:
    message = refused(save(tmp_path / "d.jsonl", b"oops\n" * 7))
    assert "all 7 records were rejected; line 1: not valid JSON" in message
    rows = [GOOD | {"options": []}] * 100
    message = refused(save(tmp_path / "d.json", orjson.dumps(rows)))
    assert "all 100 records were rejected; record 1: field 'options'" in message


def test_duplicate_ids(tmp_path: Path) -> None:
    row = orjson.dumps({"id": "same", **GOOD}) + b"\n"
    source = open_records(save(tmp_path / "d.jsonl", row * 3))
    assert [item.id for item in source] == ["same", "same#2", "same#3"]


def split(items: Iterator[Record | Reject]) -> tuple[list[Record], list[Reject]]:
    every = list(items)
    return (
        [item for item in every if isinstance(item, Record)],
        [item for item in every if isinstance(item, Reject)],
    )


def test_truncated_gzip_keeps_the_records_before_the_break(tmp_path: Path) -> None:
    rows = [{"question": RANDOM.randbytes(20).hex(), "answer": "a"} for _ in range(5000)]
    plain = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    for name, data in (
        ("d.jsonl.gz", gzip.compress(plain, mtime=0)),
        ("d.jsonl.zst", pa.compress(plain, codec="zstd", asbytes=True)),
    ):
        source = open_records(save(tmp_path / name, data[: len(data) * 2 // 3]))
        records, rejects = split(iter(source))
        assert [r.row for r in records] == rows[: len(records)]
        assert len(records) > 1500
        (reject,) = rejects
        assert reject.line == len(records) + 1
        assert "the compressed file is truncated or damaged from here on" in reject.reason
        assert orjson.dumps(rows[len(records)]).startswith(reject.data)


def test_truncated_gzip_of_csv_and_json(tmp_path: Path) -> None:
    table = "question,answer\n" + "".join(f"{RANDOM.randbytes(20).hex()},a\n" for _ in range(5000))
    array = json.dumps([{"question": RANDOM.randbytes(20).hex(), "answer": "a"}] * 5000)
    for name, text in (("d.csv.gz", table), ("d.json.gz", array)):
        data = gzip.compress(text.encode(), mtime=0)
        records, rejects = split(iter(open_records(save(tmp_path / name, data[: len(data) // 2]))))
        assert len(records) > 500
        assert ["truncated" in reject.reason for reject in rejects] == [True]


def test_gzip_that_expands_without_end(tmp_path: Path) -> None:
    bomb = gzip.compress(LINE + b"\n" + b"0" * 100_000_000 + b"\n" + LINE, mtime=0)
    assert len(bomb) < 150_000
    path = save(tmp_path / "d.jsonl.gz", bomb)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records, (reject,) = split(iter(open_records(path)))
    assert len(records) == 2
    assert (reject.line, reject.size) == (2, 100_000_000)
    assert reject.reason == "longer than 8388608 bytes"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000, "kilobytes; the line alone has 100,000"


HEADER = "question,answer\n"


@pytest.mark.parametrize(
    ("body", "kinds", "reason"),
    [
        ('q,"open\nq,a\nq,a\n', "xrr", "broken CSV: a quoted field is never closed"),
        ('q,a\nq,"open\nq,a\n"q",a\nq,a\n', "rxrrr", "broken CSV: text after a closing quote"),
        ('q,"x"y\nq,a\n', "xr", "broken CSV: text after a closing quote"),
        ("q,a\rb\nq,a\n", "xr", "broken CSV: a carriage return outside quotes"),
        ("q,a,b\nq,a\n", "xr", "expected 2 fields, found 3"),
        ("q\nq,a\n", "xr", "expected 2 fields, found 1"),
        ("q,\nq,a\n", "xr", "empty answer (field 'answer')"),
        ("q,a\0\nq,a\n", "xr", "NUL byte at offset 3"),
    ],
)
def test_csv_with_a_broken_quote_or_row(tmp_path: Path, body: str, kinds: str, reason: str) -> None:
    items = list(open_records(save(tmp_path / "d.csv", HEADER + body)))
    assert "".join("r" if isinstance(item, Record) else "x" for item in items) == kinds
    reject = next(item for item in items if isinstance(item, Reject))
    line = kinds.index("x") + 2
    assert (reject.line, reject.reason) == (line, reason)
    assert reject.data.decode() == (HEADER + body).split("\n")[line - 1]


def test_very_wide_tables(tmp_path: Path) -> None:
    """Comparing every name, or every cell's name, with every other would take minutes."""
    names = [f"column {n}" for n in range(200_000)]
    text = ",".join(["question", "answer", *names])
    source = open_records(save(tmp_path / "d.csv", f"{text}\nq,a{',x' * len(names)}\n"))
    assert len(source.fields) == len(names) + 2
    assert "line 1: the column 'column 7' appears twice" in refused(
        save(tmp_path / "d.csv", text + ",column 7\nq,a\n")
    )
    names = names[:20_000]
    cells = {"question": ["q", " "], "answer": ["a"] * 2} | {name: [1, 2] for name in names}
    table = pa.table(cells)
    pq.write_table(table, tmp_path / "d.parquet")
    _, (reject,) = split(iter(open_records(str(tmp_path / "d.parquet"))))
    assert reject.reason == "empty question (field 'question')"
    assert reject.data.startswith(b'{"question":" ","answer":"a","column 0":2,')


def test_csv_with_invalid_utf8(tmp_path: Path) -> None:
    data = HEADER.encode() + b'q,a\n"two\n\xfflines",a\nq,a\n'
    records, (reject,) = split(iter(open_records(save(tmp_path / "d.csv", data))))
    assert [record.line for record in records] == [2, 5]
    assert (reject.line, reject.data) == (3, b'"two\n\xfflines",a')
    assert reject.reason == "not valid UTF-8: byte 0xff at offset 5"


def test_csv_with_a_quote_that_swallows_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_package, "MAX_LINE_BYTES", 10_000)
    body = 'q,"open\n' + "q,a\n" * 3000
    source = open_records(save(tmp_path / "d.csv", HEADER + body))
    records, (reject,) = split(iter(source))
    assert len(records) == 3000
    assert "a quoted field makes the record longer than 10000 bytes" in reject.reason


@pytest.mark.parametrize(
    ("lines", "good"),
    [
        (['z",w,"q'] * 3000, 0),
        (['z",w,"q'] * 3000 + ['x"y,'], 1),  # the chain of quotes breaks, at last
        (['z",w,"q', "q,a"] * 1500, 1500),
        (["q,a"] * 99 + ['"q,a'] + (["q,a"] * 99 + ['z",w,"q']) * 29, 99 * 30),
    ],
)
def test_csv_lines_of_open_quotes_are_read_a_few_times_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], good: int
) -> None:
    reads = 0
    hand_out = framing._CsvFeed.__next__

    def counted(feed: framing._CsvFeed) -> str:
        nonlocal reads
        reads += 1
        return hand_out(feed)

    monkeypatch.setattr(framing._CsvFeed, "__next__", counted)
    chunks = iter(["\n".join(lines).encode()])
    items = list(framing.split_csv(framing.split_lines(chunks, 1 << 20), 1 << 20))
    rejects = [item for item in items if isinstance(item, Reject)]
    assert len(items) == len(lines)
    assert len(items) - len(rejects) == good
    assert {reject.reason.partition(": ")[0] for reject in rejects} == {"broken CSV"}
    assert reads < 12 * len(lines), "every line once for each record before it would be 4,500,000"


def test_csv_records_of_many_lines_survive_a_stray_quote(tmp_path: Path) -> None:
    long = 'q,"' + "line\n" * 300 + 'end"\n'
    records, rejects = split(
        iter(open_records(save(tmp_path / "d.csv", HEADER + 'q,a"\n"q,a\n' + long * 3)))
    )
    assert [len(record.answer) for record in records[-2:]] == [1503, 1503]
    assert 0 < len(rejects) < 310


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float) -> None:
    pq.write_table(
        pa.table({"question": ["q"] * 2, "answer": [1.5, value]}), tmp_path / "d.parquet"
    )
    (record,), (reject,) = split(iter(open_records(str(tmp_path / "d.parquet"))))
    assert record.answer == "1.5"
    assert reject.reason == f"field 'answer': expected a finite number, found {value}"


def test_parquet_that_breaks_off(tmp_path: Path) -> None:
    text = [f"{n:080}" for n in range(9000)]
    pq.write_table(
        pa.table({"question": text, "answer": text}),
        tmp_path / "d.parquet",
        row_group_size=3000,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    data = bytearray((tmp_path / "d.parquet").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 9000] = bytes(9000)
    records, (reject,) = split(iter(open_records(save(tmp_path / "d.parquet", bytes(data)))))
    assert {*range(1, 3001), *range(6001, 9001)} <= {record.line for record in records}
    assert 3000 < reject.line <= 6000
    assert reject.reason.startswith(f"{6001 - reject.line} records from here on are damaged")


def write_all(out: Path, source: RecordSource, records: list[Record]) -> None:
    with RecordWriter(out, source) as writer:
        for record in records:
            writer.write(record, "b")


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let no file grow beyond 64 KiB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.json", "d.csv", "d.csv.gz", "d.csv.zst", "d.parquet"]
)
def test_disk_full(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    rows = [{"question": RANDOM.randbytes(500).hex(), "answer": "a"} for _ in range(300)]
    data = (
        b"[" + b",".join(map(orjson.dumps, rows)) + b"]"
        if name == "d.json"
        else b"".join(orjson.dumps(row) + b"\n" for row in rows)
        if name == "d.jsonl"
        else (HEADER + "".join(f"{row['question']},a\n" for row in rows)).encode()
    )
    if name == "d.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    elif name.count(".") > 1:
        codec = "gzip" if name.endswith("gz") else "zstd"
        save(tmp_path / name, pa.compress(data, codec=codec, asbytes=True))
    else:
        save(tmp_path / name, data)
    source = open_records(str(tmp_path / name))
    records = [item for item in source if isinstance(item, Record)]
    out = tmp_path / "out" / name
    request.getfixturevalue("small_files")
    with pytest.raises(UserError, match=f"{name}: cannot be written"):
        write_all(out, source, records)
    assert list(out.parent.iterdir()) == []


def test_read_only_output(tmp_path: Path) -> None:
    source = open_records(save(tmp_path / "d.jsonl", LINE))
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written"),
        RecordWriter(tmp_path / "file" / "out.jsonl", source),
    ):
        pass


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one(tmp_path: Path, limit: int) -> None:
    with pytest.raises(UserError, match="limit: expected a number of records from 1"):
        open_records(save(tmp_path / "d.jsonl", LINE), limit=limit)


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


Splitter = Callable[[Iterator[bytes], int], Iterator[Any]]


@pytest.mark.parametrize("split_into", [framing.split_lines, framing.split_array])
@settings(max_examples=150)
@given(
    text=st.lists(st.sampled_from(['{"a":', "[", "]", "}", ",", '"', "\\", "\n", " ", "xy", "é"])),
    size=st.integers(1, 9),
    limit=st.integers(1, 30),
)
def test_where_the_chunks_break_does_not_matter(
    split_into: Splitter, text: list[str], size: int, limit: int
) -> None:
    data = ("[" + "".join(text)).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "REJECT_BYTES", 8)
        whole = list(split_into(iter([data]), limit))
        assert list(split_into(pieces(data, size), limit)) == whole
    if split_into is framing.split_lines:
        found = [i.size if isinstance(i, Reject) else len(i[1]) for i in whole]
        assert found == [len(line) for line in data.removesuffix(b"\n").split(b"\n")]


_JUNK = st.lists(
    st.one_of(
        st.binary(max_size=8),
        st.sampled_from([b"\n", b"\r\n", b'"', b",", b"question,answer\n", b"q,a\n", b"[", b"]"]),
        st.just(LINE),
    ),
    max_size=12,
).map(b"".join)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'"\n"', r"has these fields: \\n; say which"),
        (b"Question;ANSWER\na;b\n", r"Question, ANSWER; add --schema qa:Question,ANSWER$"),
        (b"Instruction,Output,Input\na,b,c\n", r"add --schema alpaca:Instruction,Input,Output$"),
        (b"Question,A,B,Answer\na,b,c,A\n", r"add --schema choice:Question,Answer$"),
        (b"Question,Options,Answer Key\na,b,c\n", r"has these fields: Question, Options, Answer"),
        (b"frage;antwort\na;b\n", r"has these fields: frage, antwort; say which"),
    ],
)
def test_columns_that_fit_no_schema_are_told_in_one_line(
    tmp_path: Path, text: bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message) as told:
        open_records(save(tmp_path / "d.csv", text))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    junk=_JUNK,
    head=st.sampled_from([b"", LINE + b"\n", b"[" + LINE + b",", b"question,answer\nq,a\n"]),
)
def test_any_bytes_end_in_records_rejects_or_one_line(
    tmp_path: Path, name: str, junk: bytes, head: bytes
) -> None:
    path = save(tmp_path / name, head + junk)
    message = ""
    try:
        source = open_records(path)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    if message:
        return
    items = list(source)
    with RecordWriter(tmp_path / "out", source) as writer:
        for item in items:
            if isinstance(item, Record):
                writer.write(item, item.answer)
    again = list(open_records(save(tmp_path / name, (tmp_path / "out").read_bytes())))
    first = [(r.question, r.answer) for r in items if isinstance(r, Record)]
    assert [(r.question, r.answer) for r in again if isinstance(r, Record)] == first
