"""Files that are either there in full or not there at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from robustft.errors import UserError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class BusyError(UserError):
    """Another process holds what this one needs."""


def make_folder(folder: Path) -> None:
    """Make a folder, and those it lies in; an OSError names the file that is in the way, if any."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        places = (folder, *folder.parents)
        file = next((one for one in places if one.exists() and not one.is_dir()), folder)
        told = f"{file} is a file; expected a folder"
        raise NotADirectoryError(errno.ENOTDIR, told, str(file)) from None


@contextlib.contextmanager
def locked(path: Path, *, wait: str | None = None) -> Iterator[int | None]:
    """Hold the file `path` against other processes; yields its handle.

    The kernel drops the lock when its holder dies, however it dies. `wait` says what another
    process does meanwhile: it is told on stderr, and waited for. On a file system that knows no
    locks nothing is held, and None given.

    Raises:
        BusyError: another process holds it, and there is nothing to `wait` for. Its text is what
            the holder wrote into the file.
        UserError: there can be no such file.
    """
    try:
        make_folder(path.parent)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except NotADirectoryError as error:
        raise UserError(f"{error.filename}: is a file; expected a folder") from None
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written: {error.strerror}") from error
    held: int | None = handle
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                said = os.pread(handle, 100, 0).decode("ascii", "replace").strip() or "unknown"
                raise BusyError(said) from None
            print(f"robustft: waiting for another process, which {wait}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"{path}: cannot be locked: {error.strerror}") from error
            held = None
        yield held
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove what killed processes were about to make `folder`'s files or folders of these names.

    Names may hold wildcards. Only for who holds the folder: `replacing` and `publishing` of others
    would lose their work.
    """
    for name in names:
        for left in folder.glob(f".{name}.*.tmp"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path` to write to; it is gone after the block, unless renamed.

    What killed processes have left of theirs goes first. An OSError of the block (disk full,
    read-only folder) becomes a UserError naming `path`.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make_folder(path.parent)
        _remove_abandoned(path)
        with _marked_as_alive(draft):
            yield draft
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _marked_as_alive(draft: Path) -> Iterator[None]:
    """Make the file and hold its lock, by which `_remove_abandoned` of others knows to spare it.

    The kernel drops the lock when its holder dies.
    """
    while True:
        handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: none is removed there
                fcntl.flock(handle, fcntl.LOCK_EX)
            # Before it was locked, another process may have taken it for abandoned.
            if draft.exists() and os.path.samestat(os.fstat(handle), draft.stat()):
                os.ftruncate(handle, 0)  # the number of a process that died may be ours now
                yield
                return
        finally:
            os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Remove the drafts of `path` that processes have left which are dead now."""
    prefix = f".{path.name}."
    for left in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        if not left.name.removeprefix(prefix).removesuffix(".tmp").isdigit():
            continue
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Before it was locked, its writer may have renamed it and begun another.
                if os.path.samestat(os.fstat(handle), left.stat()):
                    left.unlink()
            finally:
                os.close(handle)


def rename_synced(draft: Path, path: Path) -> None:
    """Bring a file to the disk and rename it to `path`."""
    with draft.open("rb") as handle:
        os.fsync(handle.fileno())
    draft.replace(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`.

    On any exception the temporary file is removed and `path` keeps what it held. An OSError from
    the block or the rename (disk full, read-only folder) becomes a UserError naming `path`.
    """
    with drafted(path) as temporary:
        yield temporary
        rename_synced(temporary, path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes to `path` so that a reader sees the old or the new file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def spare(out: Path, given: str | Path) -> None:
    """Raise UserError where writing `out` would destroy the input `given`, or add to its folder."""
    if out.exists() and Path(given).exists() and out.samefile(given):
        raise UserError(f"{out}: is the input itself; choose another name")
    spare_input_folder(out, Path(given))


def spare_input_folder(out: Path, given: Path) -> None:
    """Raise UserError where `out` lies in the input `given`, a folder.

    It would be read as one more of its data files, by the same command called again, too.
    """
    if given.is_dir() and out.resolve().is_relative_to(given.resolve()):
        raise UserError(f"{out}: lies in the input folder; choose another --out")


def spare_others(paths: Iterable[Path]) -> None:
    """Raise UserError where one of these, of which robustft wrote none, is there and not empty."""
    for path in paths:
        if path.exists() and (not path.is_file() or path.stat().st_size):
            raise not_ours(path)


def not_ours(path: Path | str) -> UserError:
    """What to tell of an output that another program or command wrote."""
    if Path(path).is_dir():
        return UserError(f"{path}: is a folder; expected the name of a file")
    return UserError(
        f"{path}: is there already and was not written by this command; choose another --out, or "
        "move it away"
    )


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that appears as `path` only when the block has succeeded."""
    with replacing(path) as temporary, temporary.open("wb") as handle:
        yield handle
