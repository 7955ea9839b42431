"""An output file of lines that a killed run goes on with.

The lines stand in a hidden file beside the output, `.NAME.DIGEST.partial`, chunk by chunk, until
the last one is there; then the file takes the output's name. DIGEST tells what the lines depend on,
so that another run never goes on with them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import orjson

from robustft.errors import UserError
from robustft.files import spare_others


def spare_other_lines(path: Path, fields: Sequence[str]) -> None:
    """Raise UserError where `path` is a file of somebody else's.

    That is one whose first line is not a JSON object with at least one of `fields`.
    """
    try:
        with path.open("rb") as file:
            first = orjson.loads(file.readline(1 << 24))
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        first = None
    if not (isinstance(first, dict) and any(name in first for name in fields)):
        spare_others([path])


class ResumableLines:
    """Lines of `path`, which appears when the `with` block ends well; else they are kept.

    Parameters
    ----------
    path: the output; one that is there already stays until then.
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
        self._kept = True  # whether an earlier run's lines may follow

    def take(self, count: int) -> list[bytes]:
        """The next `count` lines, as an earlier run has written them; none where it did not."""
        if not self._kept:
            return []
        with self._telling():
            start = self._file.tell()
            lines = [self._file.readline() for _ in range(count)]
            # The end may be torn, and after a power cut be anything.
            if all(line.startswith(b"{") and line.endswith(b"}\n") for line in lines):
                return lines
            self._kept = False
            self._file.seek(start)
            self._file.truncate()
        return []

    def add(self, lines: Sequence[bytes]) -> None:
        """Write lines that `take` did not have, and bring them to the disk."""
        with self._telling():
            self._file.writelines(lines)
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        with self._telling():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                self._file = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._file.close()
                    raise UserError(f"{self._path}: another run is writing it") from None
                except OSError:  # a file system without locks
                    break
                # The one who held it may have finished, and given the file its name.
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.fstat(self._file.fileno()), self._partial.stat()):
                        break
                self._file.close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                with self._telling():
                    self._file.truncate()
                    os.fsync(self._file.fileno())
                    self._partial.replace(self._path)
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
