"""Shards of files in every form that is read: the bytes of one process."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commandline import CommandLine, quiz, read, write

from robustft.records import open_records
from robustft.records.formats import dump_json

ROWS = 600  # two units
TEXTS = ["red", "green", "blue"]


def named(letter: str, labels: str, keys: tuple[str, str]) -> tuple[Any, str]:
    """A list of objects, and the answer's label."""
    options = [dict(zip(keys, one, strict=True)) for one in zip(labels, TEXTS, strict=True)]
    return options, labels["ABC".index(letter)]


def columns(letter: str, keys: tuple[str, str]) -> tuple[Any, str]:
    """ARC's labels and texts."""
    return {keys[0]: list("ABC"), keys[1]: TEXTS}, letter


def lettered(letter: str, *, text: bool) -> tuple[Any, str]:
    """Options such as "A. red", and one of these, or its letter."""
    options = [f"{one}. {told}" for one, told in zip("ABC", TEXTS, strict=True)]
    return options, options["ABC".index(letter)] if text else letter


FORMS = (
    lambda letter: named(letter, "ABC", ("id", "text")),
    lambda letter: named(letter, "xyz", ("label", "text")),
    lambda letter: named(letter, "123", ("key", "value")),
    lambda letter: columns(letter, ("label", "text")),
    lambda letter: columns(letter, ("id", "value")),
    lambda letter: (dict(zip("ABC", TEXTS, strict=True)), letter),
    lambda letter: lettered(letter, text=True),
    lambda letter: lettered(letter, text=False),
    lambda letter: (TEXTS, f"{letter}. {TEXTS['ABC'.index(letter)]}"),
)


def rows(forms: range = range(len(FORMS))) -> list[dict[str, Any]]:
    """Every question in one of these forms."""
    return [
        {"n": number, "question": row["question"], "options": made[0], "answer": made[1]}
        for number, row in enumerate(quiz(ROWS))
        for made in [FORMS[forms[number % len(forms)]](row["answer"])]
    ]


def jsonl(folder: Path) -> Path:
    lines: list[Any] = [*rows(), b"{broken"]
    lines[100:100] = [b'{"question": "no options", "answer": "A"}']
    return write(folder / "in.jsonl", lines)


def dotted(folder: Path) -> Path:
    found = [
        {"Q": {"stem": row["question"], "Opts": row["options"]}, "Ans": row["answer"]}
        for row in rows()
    ]
    return write(folder / "in.jsonl", found)


def arc(folder: Path) -> Path:
    found = [
        {"id": f"r{row['n']}", "question": {"stem": row["question"], "choices": row["options"]},
         "answerKey": row["answer"]} for row in rows(range(3))
    ]  # fmt: skip
    return write(folder / "in.jsonl", found)


def table(folder: Path, name: str, mark: str, before: str = "") -> Path:
    text = io.StringIO(newline="")
    text.write(before)
    writer = csv.writer(text, delimiter=mark)
    writer.writerow(["n", "question", f"notes{' ,' if mark == ';' else ''}", "options", "answer"])
    for row in rows():
        options = dump_json(row["options"]).decode()
        writer.writerow([row["n"], row["question"], "", options, row["answer"]])
    (folder / name).write_text(text.getvalue(), newline="")
    return folder / name


def parquet(folder: Path, forms: range) -> Path:
    pq.write_table(pa.Table.from_pylist(rows(forms)), folder / "in.parquet")
    return folder / "in.parquet"


FILES = {
    "every form": (jsonl, None),
    "dotted fields": (dotted, "choice:Q.stem,Q.Opts,Ans"),
    "arc": (arc, None),
    "tabs": (lambda folder: table(folder, "in.tsv", "\t"), None),
    "semicolons": (lambda folder: table(folder, "in.csv", ";"), None),
    "a line for Excel": (lambda folder: table(folder, "in.csv", ";", "sep=;\r\n"), None),
    "parquet, lists": (lambda folder: parquet(folder, range(3)), None),
    "parquet, objects": (lambda folder: parquet(folder, range(3, 6)), None),
}


@pytest.mark.parametrize("name", FILES)
def test_merged_shards_of_any_form_are_the_run_of_one_process(
    run: CommandLine, tmp_path: Path, name: str
) -> None:
    make, schema = FILES[name]
    options = ("--schema", schema) if schema else ()
    source, whole, out = make(tmp_path), tmp_path / "whole", tmp_path / "out"
    arguments = ("clean", source, *options, "--detector", "paper", "--out")
    assert run(*arguments, whole).status == 0
    for shard, status in ((1, 4), (0, 0), (1, 0)):
        told = run(*arguments, out, "--wait", 0, "--shard", f"{shard}/2")
        assert told.status == status, told.err
    assert run("merge", out).status == 0
    cleaned = f"cleaned{source.suffix}"
    for result in ("verdicts.jsonl", cleaned, "rejects.jsonl"):
        assert (whole / result).read_bytes() == (out / result).read_bytes(), result
    verdicts = [line for line in read(out / "verdicts.jsonl") if line["action"] != "drop"]
    found = list(open_records(str(out / cleaned), schema=schema))
    assert [item.answer for item in found] == [verdict["answer"] for verdict in verdicts]
    assert any(verdict["action"] == "relabel" for verdict in verdicts)
