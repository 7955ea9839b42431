"""The cleaned set as other trainers read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commandline import CommandLine, quiz, read, write

from robustft.engines import Prompt
from robustft.exchange import DATASET_INFO, MESSAGES, write_exchange
from robustft.records import open_records

ROWS: dict[str, dict[str, Any]] = {
    "qa": {"question": "Capital of France?", "answer": "Paris"},
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "It is three, I would say so."},
    "prompt-completion": {"prompt": "Capital of France?", "completion": "Paris"},
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Capital of France?"},
            {"role": "assistant", "content": "Paris"},
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Capital of France?"},
            {"from": "gpt", "value": "Paris"},
        ]
    },
}


def exchanged(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    folder = path.parent
    source = open_records(str(path))
    write_exchange(source, folder, [item.id for item in source])
    return read(folder / MESSAGES), json.loads((folder / DATASET_INFO).read_text())


@pytest.mark.parametrize("schema", ROWS)
def test_every_open_schema_loads_as_it_is(tmp_path: Path, schema: str) -> None:
    lines, info = exchanged(write(tmp_path / "cleaned.jsonl", [ROWS[schema]]))
    turns = lines[0]["messages"]
    assert [turn["role"] for turn in turns][-2:] == ["user", "assistant"]
    assert set(info) == {"messages", "cleaned"}
    assert info["cleaned"]["file_name"] == "cleaned.jsonl"
    columns = info["cleaned"]["columns"].values()
    assert set(columns) <= set(ROWS[schema])


def test_a_choice_is_shown_with_its_options(tmp_path: Path) -> None:
    row = quiz(1)[0]
    lines, info = exchanged(write(tmp_path / "cleaned.jsonl", [row]))
    user, assistant = lines[0]["messages"]
    assert user["content"].startswith(f"{row['question']}\nA. red\nB. green\nC. blue\n")
    assert assistant == {"role": "assistant", "content": f"Answer: {row['answer']}"}
    assert lines[0]["id"] == row["id"]
    assert set(info) == {"messages"}


def test_a_system_turn_comes_first(tmp_path: Path) -> None:
    lines, _ = exchanged(write(tmp_path / "cleaned.jsonl", [ROWS["messages"]]))
    assert lines[0]["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Six times seven?", "answer": 42},
        {"instruction": "Add.", "input": None, "output": "three"},
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "Capital of France?"},
                {"role": "assistant", "content": "Paris"},
            ]
        },
    ],
    ids=["number", "null", "role"],
)
def test_a_file_that_would_be_misread_is_offered_as_messages_only(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    lines, info = exchanged(write(tmp_path / "cleaned.jsonl", [row]))
    assert set(info) == {"messages"}
    assert all(isinstance(turn["content"], str) for turn in lines[0]["messages"])


def test_csv_and_compressed_files_are_offered_as_messages_only(tmp_path: Path) -> None:
    table = tmp_path / "cleaned.csv"
    table.write_text("question,answer\nSix times seven?,42\n")
    assert set(exchanged(table)[1]) == {"messages"}


def test_parquet_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "cleaned.parquet"
    pq.write_table(pa.Table.from_pylist([ROWS["qa"]]), path)
    assert exchanged(path)[1]["cleaned"]["file_name"] == "cleaned.parquet"


def test_clean_writes_both_on_request(run: CommandLine, tmp_path: Path) -> None:
    rows = [{name: row[name] for name in row if name != "id"} for row in quiz(40)]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    clean = ("clean", source, "--out", out, "--detector", "paper")
    assert run(*clean).status == 0
    assert not (out / MESSAGES).exists()
    (out / DATASET_INFO).write_text("{}")  # another program's, since the run
    assert "was not written by this command" in run.refused(*clean, "--dataset-info")
    (out / DATASET_INFO).unlink()
    assert run(*clean, "--dataset-info").status == 0  # the finished run, resumed
    assert_as_cleaned(out)
    before = (out / MESSAGES).read_bytes()
    assert run(*clean, "--beta", "1").status == 0  # another share: the files follow
    assert (out / MESSAGES).read_bytes() != before
    assert_as_cleaned(out)
    assert MESSAGES in (out / "report.html").read_text()


def assert_as_cleaned(out: Path) -> None:
    """`messages.jsonl` holds the training set, under the ids of the verdicts."""
    lines, kept = read(out / MESSAGES), read(out / "cleaned.jsonl")
    assert [line["messages"][-1]["content"] for line in lines] == [
        f"Answer: {row['answer']}" for row in kept
    ]
    verdicts = [line for line in read(out / "verdicts.jsonl") if line["action"] != "drop"]
    assert [line["id"] for line in lines] == [verdict["id"] for verdict in verdicts]
    assert (out / DATASET_INFO).exists()


def test_nothing_is_left_of_a_training_set_that_is_empty(run: CommandLine, tmp_path: Path) -> None:
    def doubt(prompt: Prompt, candidates: Sequence[str]) -> list[float]:
        """A checker that never believes; the question without content gets even odds."""
        if len(candidates) == 2:
            return [0.5, 0.5] if "N/A" in prompt.messages[-1].content else [0.1, 0.9]
        return [0.7, 0.1, 0.1]

    run.script(choose=doubt)
    source, out = write(tmp_path / "in.jsonl", quiz(9)), tmp_path / "out"
    clean = ("clean", source, "--out", out, "--detector", "paper", "--dataset-info", "--beta")
    assert run(*clean, "1").status == 0
    assert_as_cleaned(out)
    assert run(*clean, "0").status == 0
    assert not (out / MESSAGES).exists()
    assert not (out / DATASET_INFO).exists()
