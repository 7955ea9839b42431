"""A run over every kind of input: what comes in is accounted for, and keeps its form."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commandline import read, write
from runs import all_doubt, chat, choice_rows, run
from scripted import LetterEmbedder, ScriptedEngine

from robustft.answers import answer_kind
from robustft.cleaning import clean
from robustft.engines import Prompt
from robustft.errors import UserError


def test_lines_of_several_files_name_theirs(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("sub/a.jsonl", "b\udcff.jsonl"):
        write(folder / name, [*choice_rows(2), b"{broken"])
    run(folder, tmp_path / "out")
    files = ("b\\xff.jsonl", "sub/a.jsonl")
    verdicts = read(tmp_path / "out/verdicts.jsonl")
    assert [(one["file"], one["line"]) for one in verdicts] == [
        (name, line) for name in files for line in (1, 2)
    ]
    rejects = read(tmp_path / "out/rejects.jsonl")
    assert [(one["file"], one["line"]) for one in rejects] == [(name, 3) for name in files]
    assert rejects[0]["reason"] == rejects[1]["reason"]
    run(folder / "sub", tmp_path / "one")
    for name in ("verdicts.jsonl", "rejects.jsonl"):
        assert not any("file" in line for line in read(tmp_path / "one" / name))


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64()])
def test_a_new_answer_that_the_column_does_not_hold_drops_its_record(
    tmp_path: Path, kind: pa.DataType
) -> None:
    replies = {"whole": "13", "half": "12.5", "third": "1/3"}
    names = [name for name in replies for _ in range(4)]
    table = {"question": [f"{name} {n}" for n, name in enumerate(names)], "answer": [7] * 12}
    schema = pa.schema({"question": pa.string(), "answer": kind})
    pq.write_table(pa.table(table, schema=schema), tmp_path / "in.parquet")

    def reply(prompt: Prompt) -> str:
        asked = prompt.messages[-1].content
        return f"Answer: {max(replies.items(), key=lambda one: asked.rfind(one[0]))[1]}"

    engine = ScriptedEngine(choose=all_doubt, reply=reply)
    result = run(tmp_path / "in.parquet", tmp_path / "out", engine, beta=1.0)
    verdicts = read(tmp_path / "out/verdicts.jsonl")
    fits = {"whole": True, "half": pa.types.is_floating(kind), "third": False}
    for verdict, name in zip(verdicts, names, strict=True):
        assert verdict["action"] == ("relabel" if fits[name] else "drop")
        assert verdict["answer"] == (replies[name] if fits[name] else None)
        told = f"the new answer {replies[name]!r} does not fit the column's type ({kind})"
        assert (told in verdict["reason"]) != fits[name]
    written = pq.read_table(tmp_path / "out/cleaned.parquet")
    assert written.schema.field("answer").type == kind
    expected = [float(replies[name]) for name in names if fits[name]]
    assert written["answer"].to_pylist() == expected
    counts = result.counts
    assert (counts["relabel"], counts["drop"], counts["input"]) == (
        len(expected),
        12 - len(expected),
        12,
    )
    assert result.reasons["drop: new answer does not fit the column"] == counts["drop"]


@pytest.mark.parametrize(
    ("given", "reply", "answer"),
    [
        ("$7", "The answer is **$1,300**, not 7.", "1300"),
        ("Paris", "The answer is Rome, since it is the capital.", "Rome"),
        (
            "It is Paris, as far as I know.",
            "Answer: It is Rome, and has been so for long.",
            "It is Rome, and has been so for long.",
        ),
    ],
)
def test_a_new_answer_is_of_the_kind_of_the_given_one(
    tmp_path: Path, given: str, reply: str, answer: str
) -> None:
    rows = [{"question": f"What is it, {n}?", "answer": given} for n in range(8)]
    engine = ScriptedEngine(choose=all_doubt, reply=lambda prompt: reply)
    source = write(tmp_path / "in.jsonl", rows)
    run(source, tmp_path / "out", engine, detector="paper", beta=1.0)
    assert [row["answer"] for row in read(tmp_path / "out/cleaned.jsonl")] == [answer] * 8
    assert answer_kind(answer) == answer_kind(given)


def test_the_training_set_keeps_schema_order_and_unknown_fields(tmp_path: Path) -> None:
    rows = choice_rows(60)
    run(write(tmp_path / "in.jsonl", rows), tmp_path / "out")
    verdicts = {v["id"]: v for v in read(tmp_path / "out/verdicts.jsonl")}
    expected = [
        row | {"answer": verdicts[row["id"]]["answer"]}
        for row in rows
        if verdicts[row["id"]]["action"] != "drop"
    ]
    cleaned = read(tmp_path / "out/cleaned.jsonl")
    assert cleaned == expected
    assert [list(row) for row in cleaned] == [list(row) for row in expected]


def test_rows_in_memory(tmp_path: Path) -> None:
    result = clean(choice_rows(8), out=tmp_path, engine=ScriptedEngine(), embedder=LetterEmbedder())
    assert result.counts["input"] == 8
    assert len(read(tmp_path / "verdicts.jsonl")) == 8


def test_rows_in_memory_replace_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "input.jsonl"
    mine.write_text("mine")
    first, second = choice_rows(20), choice_rows(20, seed=1)
    said: list[str] = []

    def call_again() -> None:
        if not said:
            with pytest.raises(UserError, match="another run is working") as error:
                clean(second, out=tmp_path, engine=ScriptedEngine(), embedder=LetterEmbedder())
            said.append(str(error.value))

    engine = ScriptedEngine(before_batch=call_again)
    clean(first, out=tmp_path, engine=engine, embedder=LetterEmbedder(), detector="paper")
    assert said
    assert mine.read_text() == "mine"
    questions = {row["question"] for row in read(tmp_path / "cleaned.jsonl")}
    assert questions
    assert questions <= {row["question"] for row in first}


@pytest.mark.parametrize("count", [29, 30, 31])
def test_an_input_that_changes_while_it_is_worked_on(tmp_path: Path, count: int) -> None:
    source = write(tmp_path / "in.jsonl", choice_rows(30))
    before = source.read_bytes()
    run(source, tmp_path / "whole")

    def edit() -> None:
        write(source, choice_rows(count, seed=1))

    with pytest.raises(UserError, match=r"in\.jsonl: has changed since the run began; put it back"):
        run(source, tmp_path / "out", ScriptedEngine(before_batch=edit))
    assert not (tmp_path / "out/cleaned.jsonl").exists()
    source.write_bytes(before)
    again = ScriptedEngine()
    run(source, tmp_path / "out", again)
    assert again.asked == []
    for name in ("verdicts.jsonl", "cleaned.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def alpaca(rows: list[dict[str, Any]], path: Path) -> Path:
    body = [{"instruction": r["question"], "input": "", "output": f"It is {r['answer']}."} for r in
            rows]  # fmt: skip
    path.write_text(json.dumps(body))
    return path


def table(rows: list[dict[str, Any]], path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def comma(rows: list[dict[str, Any]], path: Path) -> Path:
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["question", "options", "answer"])
        for row in rows:
            writer.writerow([row["question"], json.dumps(row["options"]), row["answer"]])
    return path


@pytest.mark.parametrize(
    ("make", "name"),
    [(alpaca, "a.json"), (chat, "a.jsonl"), (table, "a.parquet"), (comma, "a.csv")],
)
def test_every_format_and_schema(tmp_path: Path, make: Any, name: str) -> None:
    rows = [{k: v for k, v in row.items() if k != "note"} for row in choice_rows(40)]
    result = run(make(rows, tmp_path / name), tmp_path / "out")
    assert result.cleaned.name == f"cleaned{Path(name).suffix}"
    assert result.counts["keep"] + result.counts["relabel"] + result.counts["drop"] == 40
    assert len(read(tmp_path / "out/verdicts.jsonl")) == 40
    again = run(result.cleaned, tmp_path / "out2")  # what was written can be read
    assert again.counts["input"] == result.counts["keep"] + result.counts["relabel"]
