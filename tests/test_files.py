"""Files that are there in full or not at all, and what is left of them by processes that died."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

import pytest

from robustft.errors import UserError
from robustft.files import atomic_file, spare_others, write_atomically


def killed_while_writing(path: Path) -> int:
    """The id of a process that was killed before `path` was whole."""
    process = os.fork()
    if not process:
        with atomic_file(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    return process


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    left = tmp_path / f".out.txt.{killed_while_writing(tmp_path / 'out.txt')}.tmp"
    assert list(tmp_path.iterdir()) == [left]
    write_atomically(tmp_path / "out.txt", "whole")
    assert list(tmp_path.iterdir()) == [tmp_path / "out.txt"]
    assert (tmp_path / "out.txt").read_text() == "whole"


def test_what_others_are_writing_stays(tmp_path: Path) -> None:
    """Another process at work on the same file, on another file, and a file of somebody else's."""
    at_work, other, mine = (
        tmp_path / name for name in (".out.txt.7.tmp", ".out.7.tmp", ".out.txt.draft.tmp")
    )
    for path in (other, mine):
        path.touch()
    with at_work.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_atomically(tmp_path / "out.txt", "whole")
    assert set(tmp_path.iterdir()) == {at_work, other, mine, tmp_path / "out.txt"}


def test_a_writer_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "out.txt") as file:
        file.write(b"first")
        process = os.fork()
        if not process:
            write_atomically(tmp_path / "out.txt", "second")
            os._exit(0)
        os.waitpid(process, 0)
        assert (tmp_path / "out.txt").read_text() == "second"
    assert (tmp_path / "out.txt").read_text() == "first"


def test_a_writers_next_draft_is_not_taken_for_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes one write and begins the next while its draft is being looked at."""
    path, draft = tmp_path / "out.txt", tmp_path / ".out.txt.7.tmp"
    draft.write_text("first")
    lock, locked = fcntl.flock, []

    def meanwhile(handle: int, how: int) -> None:
        if not locked:
            draft.replace(path)
            draft.write_text("second")
        locked.append(handle)
        lock(handle, how)

    monkeypatch.setattr("fcntl.flock", meanwhile)
    write_atomically(path, "ours")
    assert draft.read_text() == "second"


def test_a_folder_in_place_of_an_output_is_told_from_a_file_of_others(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: is a folder; expected the name of a file"):
        spare_others([tmp_path / "folder"])
    (tmp_path / "file").write_text("notes of mine")
    with pytest.raises(UserError, match="file: is there already and was not written by this"):
        spare_others([tmp_path / "file"])
