"""The input, read once: every record's text by position, and what could not be read.

A folder that is there in full or not at all: `records.jsonl`, one line a record; `ends.i64`, where
each line ends; `rejects.jsonl`; `rejected.i64`, which items of the input those were; the counts.
Every later step takes its records from here by number, in whichever process; only the writer of
the training set goes through the rows of the input once more.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from robustft.errors import UserError
from robustft.files import locked, remove_leftovers
from robustft.progress import Progress
from robustft.records import Place, Record, RecordSource, Reject
from robustft.shards import Published, Shard, publishing
from robustft.store import UNIT_ROWS

READ_BY = ("schema", "split", "limit")  # settings that say which records of an input are read
_BLOCK_BYTES = 1 << 20  # lines are written and read together up to this much
_REASONS = 1000  # kinds of rejects told apart; the rest are counted together


def intake_folder(out: Path, identity: Mapping[str, Any]) -> Path:
    """Where the intake of an input belongs; another input or another way to read it never fits."""
    how = orjson.dumps([identity.get(name) for name in ("input", *READ_BY)])
    return out / "phases" / f"input-{hashlib.blake2b(how, digest_size=8).hexdigest()}"


def take_in(source: RecordSource, folder: Path) -> Intake:
    """Read the input unless that has been done; processes that share `folder` take turns.

    Raises UserError where the input cannot be read or changes, or the folder cannot be written.
    """
    with locked(folder.parent / ".reading", wait="reads the input") as held:
        if held is not None:
            remove_leftovers(folder.parent, folder.name)
        if not folder.is_dir():
            with publishing(folder) as (temporary, facts):
                facts.update(_write(source, temporary))
                source.require_unchanged()  # what `folder` is named by
    return Intake(folder)


def remove_others(folder: Path) -> None:
    """Remove the intakes beside this one: of inputs with which a run was tried and did not begin.

    Only for who holds the output folder.
    """
    for other in folder.parent.glob("input-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


def remove_intake(folder: Path) -> None:
    """Remove an intake, and the folder around it where that holds nothing else.

    Only for who holds the output folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds something
        (folder.parent / ".reading").unlink(missing_ok=True)
        folder.parent.rmdir()


def _write(source: RecordSource, folder: Path) -> dict[str, Any]:
    """Write the files of an intake; returns its counts."""
    reasons: Counter[str] = Counter()
    records = rejects = end = 0
    with contextlib.ExitStack() as stack:
        lines, ends, refused, numbers = (
            stack.enter_context((folder / name).open("wb"))
            for name in ("records.jsonl", "ends.i64", "rejects.jsonl", "rejected.i64")
        )
        progress = stack.enter_context(Progress("read", source.size, unit="records"))
        written: list[bytes] = []
        held = 0  # bytes in `written`

        def flush() -> None:
            nonlocal end, held
            if written:
                places = np.cumsum([len(line) for line in written], dtype="<i8") + end
                lines.writelines(written)
                ends.write(places.tobytes())
                end = int(places[-1])
                progress.update(len(written))
                written.clear()
                held = 0

        for number, item in enumerate(source):
            if isinstance(item, Record):
                fields = (item.id, item.question, item.options, item.answer, item.context)
                written.append(orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE))
                records += 1
                held += len(written[-1])
                if len(written) == UNIT_ROWS or held >= _BLOCK_BYTES:
                    flush()
            else:
                refused.write(orjson.dumps(item.told) + b"\n")
                numbers.write(number.to_bytes(8, "little"))
                rejects += 1
                known = item.reason in reasons or len(reasons) < _REASONS
                reasons[item.reason if known else "other reasons"] += 1
        flush()
    return {"records": records, "rejects": rejects, "reasons": dict(reasons)}


class Intake:
    """The records of an input by position, from the folder that `take_in` has made.

    Raises UserError where its files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        facts = Published(folder).facts
        self.folder = folder
        self.records = int(facts["records"])
        self.rejects = int(facts["rejects"])
        self.reject_reasons: Counter[str] = Counter(facts["reasons"])
        self.rejects_file = folder / "rejects.jsonl"
        try:
            # As a plain array: every look into a memmap object costs a microsecond more.
            self._ends = np.asarray(self._mapped("ends.i64", self.records))
            self._lines = os.open(folder / "records.jsonl", os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: cannot be read: {error}") from error

    def _mapped(self, name: str, rows: int) -> NDArray[np.int64]:
        if not rows:
            return np.zeros(0, np.int64)
        return np.memmap(self.folder / name, "<i8", "r", shape=(rows,))

    def units(self, shard: Shard) -> Iterator[tuple[int, list[Record]]]:
        """The units of a shard with their numbers, in input order."""
        return ((unit, self.unit(unit)) for unit in shard.units)

    def unit(self, number: int) -> list[Record]:
        """The records of one unit, without the rows they came from."""
        start = number * UNIT_ROWS
        return self._between(start, min(start + UNIT_ROWS, self.records))

    def record(self, position: int) -> Record:
        """The record at a position, without the row it came from."""
        return self._between(position, position + 1)[0]

    def _between(self, start: int, stop: int) -> list[Record]:
        try:
            return [
                Record(
                    position, 0, id_, question, None if options is None else tuple(options), answer,
                    tuple(map(tuple, context)) if context else (), {},
                )
                for position, (id_, question, options, answer, context) in zip(
                    range(start, stop), map(orjson.loads, self._read(start, stop)), strict=True
                )
            ]  # fmt: skip
        except (TypeError, ValueError) as error:
            where = self.folder / "records.jsonl"
            raise UserError(f"{where}, records {start} to {stop}: damaged ({error})") from error

    def _read(self, start: int, stop: int) -> Iterator[memoryview]:
        """The lines of the records [start, stop), of which no more than a block is held."""
        low = int(self._ends[start - 1]) if start else 0
        ends = self._ends[start:stop].tolist()
        done = 0
        while done < len(ends):
            fit = max(bisect_right(ends, low + _BLOCK_BYTES), done + 1)
            block = memoryview(self._bytes(low, ends[fit - 1]))
            begin = 0
            for end in ends[done:fit]:
                yield block[begin : end - low]
                begin = end - low
            done, low = fit, ends[fit - 1]

    def _bytes(self, low: int, high: int) -> bytes:
        """The bytes [low, high) of the lines, or as many as there are."""
        parts = []
        while low < high and (part := os.pread(self._lines, high - low, low)):
            parts.append(part)  # one read gives 2 GB at most
            low += len(part)
        return b"".join(parts)

    def rows(self, source: RecordSource) -> Iterator[tuple[Place, Mapping[str, Any]]]:
        """Place and row of every record, in input order; `source` must be what was taken in."""
        refused = iter(self._mapped("rejected.i64", self.rejects))
        skipped = next(refused, -1)
        left = self.records
        for number, item in enumerate(source.reader.rows(parsed=False)):
            if number == skipped:
                skipped = next(refused, -1)
            elif left and not isinstance(item, Reject):
                left -= 1
                yield item
            else:
                break
        if left:
            raise source.changed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._lines)
