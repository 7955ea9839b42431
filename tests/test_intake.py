"""The input read once: what comes back is what iterating the input gives."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustft.errors import UserError
from robustft.intake import intake_folder, take_in
from robustft.records import Record, Reject, count_records, open_records
from robustft.shards import Shard
from robustft.store import UNIT_ROWS

ROWS: list[Any] = [
    {"question": "q\n\u2028?", "options": ["a", "b"], "answer": "B"}, b"{broken",
    {"question": "q?"}, {"id": "x", "question": "r?", "answer": "b"}, b"   ",
    {"id": "x", "question": "s?", "options": ["a", "b"], "answer": "b"},
    *({"question": f"{n}?", "options": ["a", "b"], "answer": "a"} for n in range(UNIT_ROWS)), b"[]",
]  # fmt: skip
CHAT = [
    {"messages": [{"role": role, "content": f"{role} {n} \u00e9"} for role in
                  ("system", "user", "assistant", "user", "assistant")]} for n in range(5)
]  # fmt: skip


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(
        b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
    )
    return path


def array(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps([row for row in rows if isinstance(row, dict)], indent=1))
    return path


def table(path: Path, rows: list[Any]) -> Path:
    good = [{"options": None} | row for row in rows if isinstance(row, dict)]
    pq.write_table(pa.Table.from_pylist(good), path)
    return path


@pytest.mark.parametrize("limit", [None, 1, 2, 3, UNIT_ROWS])
@pytest.mark.parametrize(
    ("make", "name", "rows"),
    [
        (lines, "in.jsonl", ROWS), (array, "in.json", ROWS), (table, "in.parquet", ROWS),
        (lines, "in.jsonl", CHAT),
    ],
)  # fmt: skip
def test_it_gives_what_iterating_gives(
    tmp_path: Path, make: Any, name: str, rows: list[Any], limit: int | None
) -> None:
    source = open_records(str(make(tmp_path / name, rows)), limit=limit)
    items = list(source)
    expected = [item for item in items if isinstance(item, Record)]
    rejects = [item for item in items if isinstance(item, Reject)]
    with take_in(source, tmp_path / "taken") as intake:
        assert (intake.records, intake.rejects) == (len(expected), len(rejects))
        assert intake.reject_reasons.total() == len(rejects)
        whole = Shard(0, 1, 0, intake.records, tmp_path)
        found = [record for _, chunk in intake.units(whole) for record in chunk]
        assert found == [replace(record, line=0, row={}) for record in expected]
        assert intake.record(len(found) - 1) == found[-1]
        assert [(place.line, dict(row)) for place, row in intake.rows(source)] == [
            (r.line, dict(r.row)) for r in expected
        ]
        told = [json.loads(line) for line in intake.rejects_file.read_text().splitlines()]
        assert [one["reason"] for one in told] == [reject.reason for reject in rejects]


def test_units_of_long_records_are_written_and_read_in_parts(tmp_path: Path) -> None:
    """A unit holds 512 records: what stands beside them must not grow with their length."""
    size, count = 1 << 20, 48
    rows = ({"question": f"{n}" + "q" * size, "answer": "a"} for n in range(count))
    with (tmp_path / "in.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    source = open_records(str(tmp_path / "in.jsonl"))
    tracemalloc.start()
    with take_in(source, tmp_path / "taken") as intake:
        assert tracemalloc.get_traced_memory()[1] < 24 * size
        tracemalloc.reset_peak()
        unit = intake.unit(0)
        assert tracemalloc.get_traced_memory()[1] < (count + 16) * size
    tracemalloc.stop()
    assert [len(record.question) for record in unit] == [size + len(f"{n}") for n in range(count)]


def test_it_reads_once(tmp_path: Path) -> None:
    path = lines(tmp_path / "in.jsonl", ROWS)
    source = open_records(str(path))
    with take_in(source, tmp_path / "taken") as first:
        path.unlink()
        assert take_in(source, tmp_path / "taken").records == first.records


def _take(path: Path, folder: Path) -> None:
    take_in(open_records(str(path)), folder)


def test_processes_that_come_together_agree_and_leave_nothing(tmp_path: Path) -> None:
    path = lines(tmp_path / "in.jsonl", ROWS)
    (tmp_path / ".taken.0.tmp").mkdir()  # of a process that was killed
    context = multiprocessing.get_context("spawn")
    crowd = [context.Process(target=_take, args=(path, tmp_path / "taken")) for _ in range(3)]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
        assert one.exitcode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [".reading", "in.jsonl", "taken"]


def test_a_damaged_or_another_input_is_told(tmp_path: Path) -> None:
    path = lines(tmp_path / "in.jsonl", CHAT)
    source = open_records(str(path))
    with take_in(source, tmp_path / "taken") as intake:
        lines(path, CHAT[:3])
        with pytest.raises(UserError, match="has changed since the run began"):
            list(intake.rows(source))
        records = tmp_path / "taken/records.jsonl"
        records.write_bytes(records.read_bytes()[:-20])
        with pytest.raises(UserError, match=r"records.jsonl, records 4 to 5: damaged"):
            intake.record(4)
    (tmp_path / "taken/ends.i64").write_bytes(b"")
    with pytest.raises(UserError, match="taken: cannot be read"):
        take_in(source, tmp_path / "taken")
    shutil.rmtree(tmp_path / "taken")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file; expected a folder"):
        take_in(source, tmp_path / "file" / "taken")


@pytest.mark.parametrize(("limit", "share"), [(None, "20%"), (20, "100%")])
def test_progress_is_a_share_of_what_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: int | None,
    share: str,
) -> None:
    rows = [{"question": f"{n:03}?", "answer": "b"} for n in range(100)]
    source = open_records(str(lines(tmp_path / "d.jsonl", rows)), limit=limit)
    monkeypatch.setattr("robustft.intake.UNIT_ROWS", 20)
    monkeypatch.setattr("robustft.progress._SECONDS_BETWEEN_LINES", 0.0)
    take_in(source, tmp_path / "phases" / "input-x")
    count_records(source)
    said = capsys.readouterr().err.splitlines()
    assert next(line for line in said if ": read: " in line).startswith(f"robustft: read: {share},")
    assert [line for line in said if ": count: " in line][19].startswith(
        f"robustft: count: {share},"
    )


def test_another_limit_or_schema_is_another_intake(tmp_path: Path) -> None:
    identity = {"input": "abc", "schema": None, "split": "train", "limit": None, "k": 3}
    first = intake_folder(tmp_path, identity)
    assert intake_folder(tmp_path, identity | {"k": 4}) == first
    assert intake_folder(tmp_path, identity | {"limit": 5}) != first
    assert intake_folder(tmp_path, identity | {"input": "abd"}) != first
