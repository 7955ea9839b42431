from __future__ import annotations

import contextlib
import errno
import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustft.errors import UserError
from robustft.opinions import Opinion, Said
from robustft.store import Store, folder_lock


def test_what_was_stored_is_found_by_row_and_basis_the_newest_last(tmp_path: Path) -> None:
    first, nothing, later = Opinion("A", prompt_tokens=5), Opinion(None), Opinion("B")
    with Store(tmp_path / "run.sqlite") as store:
        store.add(7, "base", 0, [Said(0, "", first), Said(4, "", nothing)], 0.5)
        store.add(7, "base", 0, [Said(0, "x", later), Said(1, "x", later)], 0.5, questions=1)
        found = store.opinions(7, "base")
        assert [(*key, opinion.answer) for key, opinion in found.items()] == [
            (0, "", "A"), (4, "", None), (0, "x", "B"), (1, "x", "B"),
        ]  # fmt: skip
        assert math.isnan(found[4, ""].nll)
        assert store.opinions(7, "base", 1) == store.opinions(8, "base") == {}
        said, failures = store.panel(7)
        assert {row: opinion.answer for row, opinion in said["base"].items()} == {
            0: "B", 4: None, 1: "B"
        }  # fmt: skip
        assert failures == {}
        assert store.totals()["base"] == {
            "questions": 3, "prompt_tokens": 5, "new_tokens": 0, "seconds": 1.0
        }  # fmt: skip


def test_an_earlier_opinion_may_be_the_newest_again_and_none_at_all(tmp_path: Path) -> None:
    failed = Opinion(None, failure="HTTP 500")
    with Store(tmp_path / "run.sqlite") as store:
        for basis, answer in (("x", "A"), ("y", "B")):
            store.add(7, "context", 0, [Said(n, basis, Opinion(answer)) for n in range(3)], 0.5)
        before = store.totals()
        store.renew(7, "context", 0, [Said(0, "x", Opinion("A")), Said(1, "x", failed)])
        said, _ = store.panel(7)
        assert {row: opinion.answer for row, opinion in said["context"].items()} == {0: "A", 2: "B"}
        newest = {row: basis for row, basis in store.opinions(7, "context")}
        assert newest[0] == "x"
        assert newest[1] not in ("x", "y")
        assert newest[2] == "y"
        store.add(7, "context", 0, [Said(1, "z", Opinion("C"))], 0.0, questions=0)
        assert store.panel(7)[0]["context"][1].answer == "C"
        assert store.totals() == before


def test_a_failed_batch_leaves_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "run.sqlite") as store:
        with pytest.raises(AttributeError):
            store.add(0, "base", 0, [Said(0, "", Opinion("A")), Said(1, "", None)], 0.0)  # type: ignore[arg-type]
        assert store.opinions(0, "base") == {}


def test_failures_are_told_apart_and_open_what_rests_on_them(tmp_path: Path) -> None:
    with Store(tmp_path / "run.sqlite") as store:
        store.add(1, "base", 0, [Said(0, "", Opinion("A"))], 0.0)
        store.finish("detect", [(0, {}), (1, {}), (2, {})])
        store.finish("relabel", [(0, {})])
        assert not store.has_failures
        store.forgive()
        assert store.finished("detect") == [0, 1, 2]
        store.add(1, "base", 0, [Said(3, "", Opinion(None, failure="HTTP 500"))], 0.0)
        assert store.panel(1)[1] == {3: "HTTP 500"}
        assert store.has_failures
        store.forgive()
        assert not store.has_failures
        assert store.finished("detect") == [0, 2]
        assert store.finished("relabel") == []
        assert store.panel(1)[1] == {}
        assert store.opinions(1, "base").keys() == {(0, "")}


def test_arrays_of_finished_units_come_back_in_order(tmp_path: Path) -> None:
    with Store(tmp_path / "run.sqlite") as store:
        store.finish("detect", [(n, {"x": np.full((2, n), n, np.float32)}) for n in (3, 0, 1)])
        found = [arrays["x"] for arrays in store.arrays("detect")]
        assert [array.shape for array in found] == [(2, 0), (2, 1), (2, 3)]
        assert [array.dtype for array in found] == [np.float32] * 3
        assert store.finished("detect") == [0, 1, 3]


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    with Store(tmp_path / "run.sqlite") as store:
        assert store.holds({"k": 3, "beta": 0.5}) is False
        store.claim({"k": 3, "beta": 0.5})
        assert store.holds({"k": 3, "beta": 0.5}) is True
        with pytest.raises(UserError, match=r"k was 3, now 5"):
            store.claim({"k": 5, "beta": 0.5})


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.sqlite").write_bytes(b"this is not a database, and long enough to say so" * 9)
    with pytest.raises(UserError, match=r"run\.sqlite: cannot be used"):
        Store(tmp_path / "run.sqlite")


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def full(*given: Any, **named: Any) -> sqlite3.Connection:
        db = connect(*given, **named)
        db.execute("PRAGMA max_page_count=1")
        return db

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(
        UserError, match=r"run\.sqlite: cannot be written: No space left on device$"
    ):
        Store(tmp_path / "run.sqlite")


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path / "run.sqlite"):
        pass
    with contextlib.closing(sqlite3.connect(tmp_path / "run.sqlite")) as database:
        database.execute("PRAGMA user_version=1")
    with pytest.raises(UserError, match=r"another version of robustft \(format 1, here 2\)"):
        Store(tmp_path / "run.sqlite")


def test_a_second_run_names_the_first(tmp_path: Path) -> None:
    code = "from pathlib import Path; from robustft.store import folder_lock\n"
    code += f"with folder_lock(Path({str(tmp_path)!r})): pass"
    with folder_lock(tmp_path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"process {os.getpid()}" in done.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_who_holds_a_folder_removes_what_killed_runs_left(tmp_path: Path) -> None:
    left = [".cleaned.jsonl.77.tmp", ".verdicts.jsonl.9.tmp", "phases/.detected.ab12.tmp"]
    for name in (*left, ".mine.1.tmp", "cleaned.jsonl", "phases/detected"):
        (tmp_path / name).mkdir(parents=True) if "detected" in name else (tmp_path / name).touch()
    with folder_lock(tmp_path):
        found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {".lock", ".mine.1.tmp", "cleaned.jsonl", "phases", "phases/detected"}


@pytest.mark.parametrize(
    ("number", "complaint"),
    [(errno.ENOLCK, "a file system without locks"), (errno.EIO, "cannot be locked: Input/output")],
)
def test_a_folder_that_cannot_be_locked_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, complaint: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(UserError, match=complaint), folder_lock(tmp_path):
        pass
