"""An output file of lines that a killed run goes on with.

The lines stand in a hidden file beside the output, `.NAME.DIGEST.partial`, chunk by chunk as they
come, each behind a line that tells its number; when the last one is there, the newest of each make
up the output. DIGEST tells what the lines depend on, so that another run never goes on with them.
`answer_in_units` asks an engine for them.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

import orjson

from robustft.engines import Engine
from robustft.errors import UserError
from robustft.files import make_folder, replacing, spare_others
from robustft.overlap import asked
from robustft.store import UNIT_ROWS

_log = logging.getLogger("robustft")
_I = TypeVar("_I")
_R = TypeVar("_R")


def spare_other_lines(path: Path, fields: Sequence[str]) -> None:
    """Raise UserError where `path` is a file of somebody else's.

    That is one whose first line is not a JSON object with at least one of `fields`.
    """
    first = None
    if path.is_file():  # reading from a pipe would wait
        with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
            first = orjson.loads(file.readline(1 << 24))
    if not (isinstance(first, dict) and any(name in first for name in fields)):
        spare_others([path])


def _digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=8).hexdigest()


class ResumableLines:
    """Lines of `path`, which appears when the `with` block ends well; else they are kept.

    Chunks may be taken and added from any thread.

    Parameters
    ----------
    path: the output; one that is there already stays until then, and the log says so.
    identity: what the lines depend on, as JSON values.

    Raises:
    ------
    UserError where `path` cannot be written or another process is writing it.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        text = orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)
        digest = hashlib.blake2b(text, digest_size=8).hexdigest()
        self._path = path
        self._partial = path.with_name(f".{path.name}.{digest}.partial")
        self._file: IO[bytes]
        self._lock = threading.Lock()  # its position is one
        self._places: dict[int, tuple[int, int]] = {}  # chunk -> where its lines begin, their bytes
        self._chunks = 0  # taken so far

    def take(self, chunk: int, count: int) -> list[bytes]:
        """The `count` lines of a chunk, as an earlier run wrote them; none where it did not.

        Every chunk is taken, from 0 on; `add` writes others in their place.
        """
        self._chunks = max(self._chunks, chunk + 1)
        with self._lock, self._telling():
            lines = self._lines(chunk).splitlines(keepends=True)
        return lines if len(lines) == count else []

    def add(self, chunk: int, lines: Sequence[bytes]) -> None:
        """Write the lines of a chunk that was taken, and bring them to the disk."""
        body = b"".join(lines)
        told = {"chunk": chunk, "bytes": len(body), "blake2b": _digest(body)}
        head = orjson.dumps(told) + b"\n"
        with self._lock, self._telling():
            end = self._file.seek(0, os.SEEK_END)
            self._file.write(head + body)  # at once: an interrupt in between would cost the chunk
            self._file.flush()
            self._places[chunk] = end + len(head), len(body)
            os.fsync(self._file.fileno())

    def _lines(self, chunk: int) -> bytes:
        start, size = self._places.get(chunk, (0, 0))
        self._file.seek(start)
        return self._file.read(size)

    def _find_chunks(self) -> None:
        """Find what is kept. The end may be torn, and after a power cut be anything: it is cut."""
        end = 0
        with contextlib.suppress(ValueError, KeyError, TypeError):
            while line := self._file.readline():
                head = orjson.loads(line)
                start, body = self._file.tell(), self._file.read(head["bytes"])
                if _digest(body) != head["blake2b"]:
                    break
                self._places[head["chunk"]] = start, len(body)
                end = self._file.tell()
        self._file.truncate(end)

    def __enter__(self) -> Self:
        with self._telling():
            make_folder(self._path.parent)
            while True:
                self._file = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._file.close()
                    raise UserError(f"{self._path}: another run is writing it") from None
                except OSError:  # a file system without locks
                    break
                # The one who held it may have finished, and removed it.
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.fstat(self._file.fileno()), self._partial.stat()):
                        break
                self._file.close()
            self._find_chunks()
        if self._places:
            _log.warning("%s: resuming; what was asked before is not asked again", self._path)
        elif self._path.exists():
            _log.warning(
                "%s: there already; everything is asked anew, and it is replaced at the end",
                self._path,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What `add` could not write, closing cannot either; that error is the one to show.
        broken = contextlib.suppress(*(() if kind is None else (OSError,)))
        with broken, self._file:
            if kind is None:
                with replacing(self._path) as temporary, temporary.open("wb") as out:
                    out.writelines(map(self._lines, range(self._chunks)))
                with self._telling():
                    self._partial.unlink()
            elif not os.fstat(self._file.fileno()).st_size:
                self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written: {error.strerror or error}"
            ) from error


@contextlib.contextmanager
def answer_in_units(
    items: Iterable[_I],
    engine: Engine,
    lines: ResumableLines | None,
    *,
    ask: Callable[[Sequence[_I]], Sequence[_R]],
    write: Callable[[_R], bytes],
    read: Callable[[_I, bytes], _R | None],
) -> Iterator[Iterator[tuple[_R, bool]]]:
    """The result of every item, in order, and whether an earlier session had it; a `with` block's.

    A unit of items is asked about together, several units at a time where the engine waits for a
    server, and kept in `lines`, where there are any, as soon as it is done.

    Parameters
    ----------
    ask: the results of some items; called in any thread.
    write, read: a result as one line and back; `read` gives None for one to be asked for again,
        such as a failure.
    """

    def completed(number: int, unit: Sequence[_I], known: Mapping[int, _R]) -> list[_R]:
        missing = [row for row in range(len(unit)) if row not in known]
        if not missing:
            return [known[row] for row in range(len(unit))]
        fresh = zip(missing, ask([unit[row] for row in missing]), strict=True)
        found = {**known, **dict(fresh)}
        results = [found[row] for row in range(len(unit))]
        if lines is not None:
            lines.add(number, list(map(write, results)))
        return results

    def jobs() -> Iterator[tuple[Mapping[int, _R], Callable[[], list[_R]]]]:
        stream = iter(items)
        for number in itertools.count():
            unit = list(itertools.islice(stream, UNIT_ROWS))
            if not unit:
                return
            kept = [] if lines is None else map(read, unit, lines.take(number, len(unit)))
            known = {row: one for row, one in enumerate(kept) if one is not None}
            yield known, functools.partial(completed, number, unit, known)

    with asked(engine, jobs()) as answered:
        yield (
            (one, row in known) for known, results in answered for row, one in enumerate(results)
        )
