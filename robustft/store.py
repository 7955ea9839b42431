"""`run.sqlite`: every expert's opinion the moment it exists, and the lock on the output folder.

One transaction a finished batch (WAL). A process killed at any moment leaves whole batches, so a
resumed run forms the same batches, skips the finished ones and never asks twice. What is asked
together depends on one unit of the input alone, so that shards of whole units ask what one process
would.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from robustft.config import differences
from robustft.errors import UserError
from robustft.files import BusyError, locked, remove_leftovers
from robustft.opinions import Opinion, Said, opinion_columns, pack, unpack
from robustft.outputs import EXCHANGE, OUTPUTS

UNIT_ROWS = 512  # records of one unit, the last one's but for the remainder

_FORMAT = 2  # raised where a run folder of before cannot be read any more
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batches (  -- one row a finished batch: what was said and what it cost
    unit INTEGER NOT NULL,      -- number of the unit of the input, from 0
    expert TEXT NOT NULL,
    round INTEGER NOT NULL,
    opinions BLOB NOT NULL,     -- JSON lists: rows of the unit, bases, then each field of opinions
    questions INTEGER, prompt_tokens INTEGER, new_tokens INTEGER, seconds REAL
);
CREATE INDEX IF NOT EXISTS batches_of_unit ON batches (unit);
CREATE TABLE IF NOT EXISTS failures (  -- questions that got no reply in the last session
    unit INTEGER NOT NULL, row INTEGER NOT NULL, reason TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS failures_of_unit ON failures (unit);
CREATE TABLE IF NOT EXISTS units (  -- one row a unit that a phase has finished
    phase TEXT NOT NULL, unit INTEGER NOT NULL,
    arrays BLOB NOT NULL,       -- what later steps need of it, as an .npz file
    PRIMARY KEY (phase, unit)
);
"""


_WITHDRAWN = "withdrawn"  # the basis of a row whose earlier opinions answer another prompt


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the output folder, and remove what killed runs have left half written.

    A second run fails at once, naming the first: BusyError.
    """
    with contextlib.ExitStack() as stack:
        try:
            handle = stack.enter_context(locked(folder / ".lock"))
        except BusyError as error:
            raise BusyError(
                f"{folder}: another run is working in this folder (process {error}); wait for it "
                "or choose another --out"
            ) from None
        if handle is None:
            raise UserError(
                f"{folder}: lies on a file system without locks, where two runs would spoil each "
                "other's work; choose another --out"
            )
        with contextlib.suppress(OSError):  # on a full disk the lock holds without its number
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode("ascii"), 0)
        remove_leftovers(folder, "cleaned.*", *OUTPUTS, *EXCHANGE)
        remove_leftovers(folder / "phases", "*")
        yield


def refuse_changes(folder: Path, found: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Raise UserError naming every difference between a run's configuration and the one given."""
    now = orjson.loads(orjson.dumps(fingerprint))
    changed = differences(found, now)
    if changed:
        raise UserError(
            f"{folder}: holds a run with another configuration: {'; '.join(changed)}; choose "
            "another --out or repeat the old settings"
        )


class Store:
    """The opinions of one run. One process writes (`folder_lock`); others may read meanwhile.

    Opinions may be read and added from any thread; the rest is one thread's.

    With `exclusive` nobody may, which needs no memory shared between processes: over a network
    file system there is none.
    """

    def __init__(self, path: Path, *, exclusive: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()  # a transaction is the connection's, not the thread's
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            if exclusive:
                self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA cache_size=-16384")
            new = self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is None
            if new:
                self._db.execute(f"PRAGMA user_version={_FORMAT}")
            self._db.executescript(_SCHEMA)
            (found,) = self._db.execute("PRAGMA user_version").fetchone()
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise UserError(
                    f"{path}: cannot be written: {os.strerror(errno.ENOSPC)}"
                ) from error
            raise UserError(
                f"{path}: cannot be used as the run's store ({error}); expected the run.sqlite of "
                "an earlier run or a writable folder"
            ) from error
        if found != _FORMAT:
            self._db.close()
            raise UserError(
                f"{path}: was written by another version of robustft (format {found}, here "
                f"{_FORMAT}); finish the run with that version or choose another --out"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; a failure of the database (disk full, damaged file) becomes a UserError."""
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        if isinstance(error, sqlite3.Error):
            raise UserError(
                f"{self.path}: {error}; what is finished is kept, the same command resumes"
            ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # --- the run's identity -----------------------------------------------------------------

    def claim(
        self, fingerprint: dict[str, Any], *, name: str = "fingerprint", free: Sequence[str] = ()
    ) -> None:
        """Bind the store to a configuration; raises UserError as `holds` does."""
        if not self.holds(fingerprint, name=name, free=free) or free:
            self.set_meta(name, fingerprint)

    def holds(
        self, fingerprint: dict[str, Any], *, name: str = "fingerprint", free: Sequence[str] = ()
    ) -> bool:
        """Whether the store is bound to this configuration already, but for what is `free`.

        Raises UserError naming every difference where it is bound to another.
        """
        found = self.get_meta(name)
        if found is None:
            return False
        found |= {key: fingerprint[key] for key in free}
        refuse_changes(self.path.parent, found, fingerprint)
        return True

    def get_meta(self, name: str) -> Any:
        """A JSON value kept beside the opinions, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else orjson.loads(row[0])

    def set_meta(self, name: str, value: Any) -> None:
        """Keep a JSON value."""
        with self._lock:
            self._db.execute(
                "INSERT INTO meta VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (name, orjson.dumps(value)),
            )

    def seconds(self, stage: str) -> float:
        """What a stage has taken in all sessions, 0 where it was not begun."""
        return float(self.get_meta(f"{stage} seconds") or 0.0)

    def keep_seconds(self, stage: str, seconds: float) -> None:
        """Keep what a stage has taken so far."""
        self.set_meta(f"{stage} seconds", seconds)

    # --- opinions ---------------------------------------------------------------------------

    def opinions(self, unit: int, expert: str, round_: int = 0) -> dict[tuple[int, str], Opinion]:
        """What an expert has said about a unit, by row of the unit and basis, the newest last."""
        rows = self._read(
            "SELECT opinions FROM batches WHERE unit = ? AND expert = ? AND round = ? "
            "ORDER BY rowid",
            (unit, expert, round_),
        )
        found: dict[tuple[int, str], Opinion] = {}
        for (body,) in rows:
            for row, basis, opinion in unpack(body):
                found.pop((row, basis), None)
                found[row, basis] = opinion
        return found

    def panel(self, unit: int) -> tuple[dict[str, dict[int, Opinion]], dict[int, str]]:
        """A unit's newest answers of every expert by row, and why rows lack what they lack."""
        found: dict[str, dict[int, Opinion]] = defaultdict(dict)
        rows = self._read(
            "SELECT expert, opinions FROM batches WHERE unit = ? AND round = 0 ORDER BY rowid",
            (unit,),
        )
        for expert, body in rows:
            places, bases, opinions = opinion_columns(body)
            found[expert].update(zip(places, opinions, strict=True))
            if _WITHDRAWN in bases:
                for place, basis in zip(places, bases, strict=True):
                    if basis == _WITHDRAWN:
                        del found[expert][place]
        failures = self._read(
            "SELECT row, reason FROM failures WHERE unit = ? ORDER BY rowid DESC", (unit,)
        )
        return found, dict(failures)

    def _read(self, query: str, values: tuple[int | str, ...]) -> list[Any]:
        """All rows, from any thread."""
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def add(
        self,
        unit: int,
        expert: str,
        round_: int,
        said: Sequence[Said],
        seconds: float,
        *,
        questions: int | None = None,
    ) -> None:
        """Write one finished batch, all of it or nothing.

        Its first `questions` opinions (None: all) were asked for, the others are those of records
        with the same question. Failures are kept apart, for this session only.
        """
        failed = [one for one in said if one.opinion.failure]
        cost = [one.opinion for one in said[:questions] if not one.opinion.failure]
        answered = [one for one in said if not one.opinion.failure]
        with self._transaction():
            if answered:
                tokens = sum(o.prompt_tokens for o in cost), sum(o.new_tokens for o in cost)
                self._insert(unit, expert, round_, pack(answered), len(cost), *tokens, seconds)
            self._db.executemany(
                "INSERT INTO failures VALUES (?, ?, ?)",
                [(unit, one.row, one.opinion.failure) for one in failed],
            )

    def renew(self, unit: int, expert: str, round_: int, said: Sequence[Said]) -> None:
        """Make opinions of earlier sessions the newest again; of a failure, that there is none."""
        gone = Opinion(None)
        kept = [Said(o.row, _WITHDRAWN, gone) if o.opinion.failure else o for o in said]
        with self._transaction():
            self._insert(unit, expert, round_, pack(kept), 0, 0, 0, 0.0)

    def _insert(self, *row: int | str | bytes | float) -> None:
        self._db.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    @property
    def has_opinions(self) -> bool:
        """Whether anybody has said anything yet."""
        return self._db.execute("SELECT 1 FROM batches").fetchone() is not None

    @property
    def has_failures(self) -> bool:
        """Whether a question of an earlier session got no reply and was not forgiven yet."""
        return self._db.execute("SELECT 1 FROM failures").fetchone() is not None

    def forgive(self) -> None:
        """Open again whatever rests on a failure of an earlier session."""
        units = self._db.execute("SELECT DISTINCT unit FROM failures").fetchall()
        if units:
            with self._transaction():
                self._db.executemany("DELETE FROM units WHERE phase = 'detect' AND unit = ?", units)
                # Whoever is judged now may be a neighbour of any record.
                self._db.execute("DELETE FROM units WHERE phase = 'relabel'")
                self._db.execute("DELETE FROM failures")

    def judge_again(self) -> None:
        """Open again all that rests on a detector; opinions are kept."""
        with self._transaction():
            self._db.execute("DELETE FROM units WHERE phase IN ('detect', 'relabel')")

    def totals(self) -> dict[str, dict[str, float]]:
        """Per expert: questions asked, tokens and seconds, over all sessions of the run."""
        rows = self._db.execute(
            "SELECT expert, SUM(questions), SUM(prompt_tokens), SUM(new_tokens), SUM(seconds) "
            "FROM batches GROUP BY expert ORDER BY MIN(rowid)"
        )
        names = ("questions", "prompt_tokens", "new_tokens", "seconds")
        return {expert: dict(zip(names, values, strict=True)) for expert, *values in rows}

    # --- units that are finished ---------------------------------------------------------------

    def finish(self, phase: str, units: Iterable[tuple[int, Mapping[str, NDArray[Any]]]]) -> None:
        """Mark units as finished, with what later steps need of them."""
        with self._transaction():
            self._db.executemany(
                "INSERT INTO units VALUES (?, ?, ?)",
                ((phase, unit, _pack_arrays(arrays)) for unit, arrays in units),
            )

    def finished(self, phase: str) -> list[int]:
        """Numbers of the units that a phase has finished, ascending."""
        rows = self._db.execute("SELECT unit FROM units WHERE phase = ? ORDER BY unit", (phase,))
        return [unit for (unit,) in rows]

    def arrays(self, phase: str) -> Iterator[dict[str, NDArray[Any]]]:
        """What `finish` was given, unit by unit."""
        rows = self._db.execute("SELECT arrays FROM units WHERE phase = ? ORDER BY unit", (phase,))
        for (body,) in rows:
            with np.load(io.BytesIO(body), allow_pickle=False) as found:
                yield {name: found[name] for name in found.files}


def _pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


class Stopwatch:
    """Seconds since it was made, and `before`."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.perf_counter() - before

    def seconds(self) -> float:
        """Elapsed wall time."""
        return time.perf_counter() - self._start
