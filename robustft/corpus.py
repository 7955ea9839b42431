"""What retrieval and relabeling need of every record: its text and its embedding, by position.

`embeddings.f32` holds float32 rows, `questions.jsonl` one line a record and `questions.idx` the
end of each line (int64). All three are appended to unit by unit and cut, on opening, to the rows
that the store has marked as finished; so a torn or missing end does no harm.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import orjson
from numpy.typing import NDArray

from robustft.errors import UserError
from robustft.records import Record
from robustft.retrieval import CosineKNN
from robustft.shards import Shard

_NAMES = ("embeddings.f32", "questions.jsonl", "questions.idx")


class CorpusWriter:
    """Appends the records of one shard, in input order.

    Raises UserError where a file cannot be written.
    """

    def __init__(self, folder: Path, dimensions: int, rows: int) -> None:
        self.rows = rows
        self._folder = folder
        self._dimensions = dimensions
        self._stack = contextlib.ExitStack()
        with self._telling(), contextlib.ExitStack() as stack:
            paths = [folder / name for name in _NAMES]
            files = [stack.enter_context(path.open("ab")) for path in paths]
            self._embeddings, self._lines, self._ends = files
            if self._embeddings.tell() < rows * dimensions * 4 or self._ends.tell() < rows * 8:
                raise UserError(
                    f"{folder}: embeddings.f32 or questions.idx is shorter than the {rows} records "
                    "that run.sqlite counts; delete the folder to start again"
                )
            with paths[2].open("rb") as ends:
                ends.seek(max(rows - 1, 0) * 8)
                self._end = int.from_bytes(ends.read(8), "little") if rows else 0
            for file, size in zip(files, (rows * dimensions * 4, self._end, rows * 8), strict=True):
                file.truncate(size)
            self._stack = stack.pop_all()

    def append(self, records: Sequence[Record], embeddings: NDArray[np.float32]) -> None:
        """Add records and their [n, dimensions] embeddings; they last once `sync` has returned."""
        lines = [
            orjson.dumps((r.id, r.question, r.options, r.answer, r.context)) + b"\n"
            for r in records
        ]
        ends = np.cumsum([len(line) for line in lines], dtype=np.int64) + self._end
        with self._telling():
            self._embeddings.write(np.ascontiguousarray(embeddings, dtype=np.float32).tobytes())
            self._lines.write(b"".join(lines))
            self._ends.write(ends.astype("<i8").tobytes())
        self._end = int(ends[-1])
        self.rows += len(records)

    def sync(self) -> None:
        """Bring everything appended so far to the disk."""
        with self._telling():
            for file in (self._embeddings, self._lines, self._ends):
                file.flush()
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder / 'embeddings.f32'}: cannot be written: {error.strerror}; what is "
                "finished is kept, the same command resumes"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What could not be written above cannot be written now; that error is the one to show.
        with contextlib.suppress(*(() if kind is None else (OSError,))):
            self._stack.close()


class _Part:
    """The finished files of one shard, mapped."""

    def __init__(self, shard: Shard) -> None:
        self.start = shard.start
        paths = [shard.folder / name for name in _NAMES]
        try:
            dimensions = paths[0].stat().st_size // (4 * shard.rows)
            shape = (shard.rows, dimensions)
            # As plain arrays: every look into a memmap object costs a microsecond more.
            self.embeddings = np.asarray(np.memmap(paths[0], np.float32, "r", shape=shape))
            self.ends = np.asarray(np.memmap(paths[2], "<i8", "r", shape=(shard.rows,)))
            self.lines = os.open(paths[1], os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise UserError(f"{shard.folder}: its corpus files cannot be read: {error}") from error

    def line(self, row: int) -> bytes:
        start = int(self.ends[row - 1]) if row else 0
        return os.pread(self.lines, int(self.ends[row]) - start, start)


class Corpus:
    """The records of all shards together, by position in the input; files are mapped, not loaded.

    `shards`: all of them, in input order, none empty.
    """

    def __init__(self, shards: Sequence[Shard], threads: int | None = None) -> None:
        self.shards = shards
        self._parts = [_Part(shard) for shard in shards]
        self._starts = np.array([shard.start for shard in shards])
        self._threads = threads
        self._index: CosineKNN | None = None

    def record(self, position: int) -> Record:
        """The record at a position, without the row it came from."""
        part = self._parts[int(np.searchsorted(self._starts, position, "right")) - 1]
        body = part.line(position - part.start)
        try:
            id_, question, options, answer, context = orjson.loads(body)
        except ValueError as error:
            raise UserError(f"questions.jsonl, record {position}: damaged ({error})") from error
        turns = tuple((role, text) for role, text in context)
        chosen = None if options is None else tuple(options)
        return Record(position, 0, id_, question, chosen, answer, turns, {})

    def questions(self, positions: NDArray[np.int64]) -> Iterator[str]:
        """The text of the question at each position."""
        return (self.record(position).question for position in positions.tolist())

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings [len(positions), dimensions] of the records at these positions."""
        owner = np.searchsorted(self._starts, positions, "right") - 1
        found = np.empty((len(positions), self._parts[0].embeddings.shape[1]), np.float32)
        for number in np.unique(owner).tolist():
            part, mine = self._parts[number], owner == number
            found[mine] = part.embeddings[positions[mine] - part.start]
        return found

    def index(self) -> CosineKNN:
        """An index of all records, each found under its position; made once."""
        if self._index is None:
            first, *others = [part.embeddings for part in self._parts]
            self._index = CosineKNN(first, threads=self._threads)
            for rows in others:
                self._index.add(rows, copy=False)
        return self._index

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for part in self._parts:
            os.close(part.lines)
