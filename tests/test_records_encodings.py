"""Text that is not UTF-8: one line for a whole file, a reject for a damaged row."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from robustft.errors import UserError
from robustft.records import Record, Reject, open_records

NAMES = ["my d.csv", "d.tsv", "d.jsonl", "d.json", "d.csv.gz"]


def text(name: str, questions: list[str]) -> str:
    """A file of this name's format with these questions."""
    if name.partition(".")[2].startswith(("csv", "tsv")):
        mark = "," if "csv" in name else "\t"
        return f"question{mark}answer\n" + "".join(f"{one}{mark}a\n" for one in questions)
    rows = [json.dumps({"question": q, "answer": "a"}, ensure_ascii=False) for q in questions]
    return "\n".join(rows) if name == "d.jsonl" else f"[{', '.join(rows)}]"


def save(path: Path, data: bytes) -> str:
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return str(path)


def refused(path: str) -> str:
    with pytest.raises(UserError) as told:
        open_records(path)
    message = str(told.value)
    assert "\n" not in message
    assert message.startswith(path)
    return message


def converted(folder: Path, message: str) -> list[str]:
    """The questions that are read after the command at the message's end."""
    command = message[min(at for w in ("gzip -dc", "iconv") if (at := message.find(w)) >= 0) :]
    if shutil.which("iconv") is None:
        pytest.skip("no iconv here")
    subprocess.run(command, shell=True, check=True)
    (new,) = folder.glob("utf8-*")
    return [item.question for item in open_records(str(new)) if isinstance(item, Record)]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_another_encoding_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, name: str
) -> None:
    questions = ["plain", "more", *(f"café “{number}”" for number in range(6))]
    message = refused(save(tmp_path / name, text(name, questions).encode("cp1252")))
    place = {"d.json": "record 3", "d.jsonl": "line 3"}.get(name, "line 4")
    rows, offset = (8, 17) if name.startswith("d.json") else (9, 3)  # the header is one, too
    assert f", {place}: expected UTF-8, found byte 0xe9 at offset {offset}" in message
    assert f"(6 of the first {rows} are not UTF-8); save it as UTF-8, or, if" in message
    assert converted(tmp_path, message) == questions


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("utf-16", "UTF-16;"),
        ("utf-32", "UTF-32;"),
        ("utf-16-le", "UTF-16LE;"),
        ("utf-16-be", "UTF-16BE;"),
        ("utf-32-le", "UTF-32LE;"),
        ("utf-32-be", "UTF-32BE;"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_utf_16_is_told_with_and_without_its_mark(
    tmp_path: Path, name: str, encoding: str, told: str
) -> None:
    questions = ["café", "日本"]
    message = refused(save(tmp_path / name, text(name, questions).encode(encoding)))
    assert f"expected UTF-8, found {told} convert it: " in message
    assert converted(tmp_path, message) == questions


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("others", "damaged"), [(["plain"] * 20, 2), (["plain"] * 90, 4), (["Größe"] * 20, 15)]
)
def test_damaged_rows_of_a_file_otherwise_utf_8_are_rejects(
    tmp_path: Path, name: str, others: list[str], damaged: int
) -> None:
    data = text(name, [*others, *["caf?"] * damaged]).encode().replace(b"f?", b"f\xe9")
    items = list(open_records(save(tmp_path / name, data)))
    rejects = [item.reason for item in items if isinstance(item, Reject)]
    assert len(rejects) == damaged
    assert len(items) == len(others) + damaged
    assert all(reason.startswith("not valid UTF-8: byte 0xe9") for reason in rejects)


@pytest.mark.parametrize("mark", [",", ";"])
def test_a_damaged_record_of_many_lines_is_one_reject(tmp_path: Path, mark: str) -> None:
    lines = [f"question{mark}answer", *[f"plain{mark}a"] * 20, '"', *["caf?"] * 9, f'"{mark}a']
    data = "\n".join(lines).encode().replace(b"f?", b"f\xe9")
    *records, reject = open_records(save(tmp_path / "d.csv", data))
    assert (len(records), isinstance(reject, Reject), reject.line) == (20, True, 22)


@pytest.mark.parametrize("name", NAMES[:4])
def test_where_the_first_block_ends_does_not_matter(tmp_path: Path, name: str) -> None:
    for shift in range(3):
        questions = ["x" * shift, *["日本" * 100] * 400]
        items = list(open_records(save(tmp_path / name, text(name, questions).encode())))
        assert sum(isinstance(item, Record) for item in items) == 400 + bool(shift)
