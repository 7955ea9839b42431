"""What retrieval and relabeling need of every record: its text and its embedding, by position.

The texts stand in the intake, the embeddings in `embeddings.f32` of each shard: float32 rows,
appended unit by unit and cut, on opening, to the rows that the store has marked as finished; so a
torn or missing end does no harm.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from robustft.errors import UserError
from robustft.intake import Intake
from robustft.records import Record
from robustft.retrieval import CosineKNN, NeighbourIndex
from robustft.retrieval.approximate import ApproximateKNN
from robustft.shards import Shard

_NAME = "embeddings.f32"


class EmbeddingWriter:
    """Appends the embeddings of one shard, in input order, after the first `rows`.

    Raises UserError where the file cannot be written.
    """

    def __init__(self, folder: Path, dimensions: int, rows: int) -> None:
        self.rows = rows
        self._path = folder / _NAME
        with self._telling(), contextlib.ExitStack() as stack:
            self._file = stack.enter_context(self._path.open("ab"))
            if self._file.tell() < rows * dimensions * 4:
                raise UserError(
                    f"{self._path}: is shorter than the {rows} records that run.sqlite counts; "
                    "delete the folder to start again"
                )
            self._file.truncate(rows * dimensions * 4)
            stack.pop_all()

    def append(self, embeddings: NDArray[np.float32]) -> None:
        """Add [n, dimensions] embeddings; they last once `sync` has returned."""
        with self._telling():
            self._file.write(np.ascontiguousarray(embeddings, dtype=np.float32).tobytes())
        self.rows += len(embeddings)

    def sync(self) -> None:
        """Bring everything appended so far to the disk."""
        with self._telling():
            self._file.flush()
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written: {error.strerror}; what is finished is kept, "
                "the same command resumes"
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
            self._file.close()


class Corpus:
    """The records of all shards together, by position in the input; files are mapped, not loaded.

    `shards`: all of them, in input order, none empty.
    `retriever`: one of `robustft.config.RETRIEVERS`.
    """

    def __init__(
        self,
        intake: Intake,
        shards: Sequence[Shard],
        threads: int | None = None,
        retriever: str = "exact",
    ) -> None:
        self.intake = intake
        self.shards = shards
        self._parts = [_embeddings(shard) for shard in shards]
        self._starts = np.array([shard.start for shard in shards])
        self.threads = threads
        self._retriever = retriever
        self._index: NeighbourIndex | None = None

    def record(self, position: int) -> Record:
        """The record at a position, without the row it came from."""
        return self.intake.record(position)

    def questions(self, positions: NDArray[np.int64]) -> Iterator[str]:
        """The text of the question at each position."""
        return (self.record(position).question for position in positions.tolist())

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings [len(positions), dimensions] of the records at these positions."""
        owner = np.searchsorted(self._starts, positions, "right") - 1
        found = np.empty((len(positions), self._parts[0].shape[1]), np.float32)
        for number in np.unique(owner).tolist():
            mine = owner == number
            found[mine] = self._parts[number][positions[mine] - self._starts[number]]
        return found

    def index(self) -> NeighbourIndex:
        """An index of all records, each found under its position; made once."""
        if self._index is None:
            self._index = self._make_index()
        return self._index

    def _make_index(self) -> NeighbourIndex:
        if self._retriever == "approximate":
            return ApproximateKNN(self._parts, threads=self.threads)
        first, *others = self._parts
        index = CosineKNN(first, threads=self.threads)
        for rows in others:
            index.add(rows, copy=False)
        return index


def _embeddings(shard: Shard) -> NDArray[np.float32]:
    """The finished embeddings of one shard, mapped."""
    path = shard.folder / _NAME
    try:
        shape = (shard.rows, path.stat().st_size // (4 * shard.rows))
        return np.asarray(np.memmap(path, np.float32, "r", shape=shape))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
