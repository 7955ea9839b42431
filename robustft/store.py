"""`run.sqlite`: every expert's opinion the moment it exists, and the lock on the output folder.

One transaction a finished batch (WAL). A process killed at any moment leaves whole batches, so a
resumed run forms the same batches, skips the finished ones and never asks twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from robustft.errors import UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS opinions (
    key BLOB NOT NULL,          -- content of the question, 16 bytes
    expert TEXT NOT NULL,
    round INTEGER NOT NULL,
    unit INTEGER NOT NULL,      -- chunk of the input that asked first
    asked INTEGER NOT NULL,     -- how often this question was put; 1 in every healthy store
    payload BLOB NOT NULL,      -- JSON of the opinion
    PRIMARY KEY (key, expert, round)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS requests (  -- one row a finished batch: what it cost
    batch INTEGER PRIMARY KEY, expert TEXT, round INTEGER, unit INTEGER, questions INTEGER,
    prompt_tokens INTEGER, new_tokens INTEGER, seconds REAL
);
CREATE TABLE IF NOT EXISTS records (position INTEGER PRIMARY KEY, id TEXT, body BLOB NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one expert said about one record.

    `nll` is eq. 7 (nats per answer token), `entropy` the mean token entropy over the same tokens;
    both NaN where the expert gave no answer. `probabilities` stand for the options (choice), or
    for the allowed replies (checker: yes, no; reviewer of free text: first, second).
    """

    answer: str | None
    text: str = ""
    nll: float = float("nan")
    entropy: float = float("nan")
    probabilities: tuple[float, ...] | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    failure: str = ""  # why there was no reply; such an opinion is never stored

    def to_json(self) -> bytes:
        """Compact JSON; NaN becomes null."""
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, payload: bytes) -> Opinion:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = orjson.loads(payload)
        for name in ("nll", "entropy"):
            if fields[name] is None:
                fields[name] = float("nan")
        if fields["probabilities"] is not None:
            fields["probabilities"] = tuple(fields["probabilities"])
        return cls(**fields)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the output folder; a second run fails at once, naming the first.

    The kernel drops the lock when its holder dies, however it dies.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the output folder: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(handle, 100, 0).decode("ascii", "replace").strip() or "unknown"
            raise UserError(
                f"{folder}: another run is working in this folder (process {holder}); wait for "
                "it or choose another --out"
            ) from None
        with contextlib.suppress(OSError):  # on a full disk the lock holds without its number
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode("ascii"), 0)
        yield
    finally:
        os.close(handle)


class Store:
    """The opinions of one run. Not shared between processes; see `folder_lock`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA cache_size=-16384")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise UserError(
                f"{path}: cannot be used as the run's store ({error}); expected the run.sqlite of "
                "an earlier run or a writable folder"
            ) from error

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
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # --- the run's identity -----------------------------------------------------------------

    def claim(self, fingerprint: dict[str, Any], *, name: str = "fingerprint") -> None:
        """Bind the store to a configuration; raises UserError as `holds` does."""
        if not self.holds(fingerprint, name=name):
            self.set_meta(name, fingerprint)

    def holds(self, fingerprint: dict[str, Any], *, name: str = "fingerprint") -> bool:
        """Whether the store is bound to this configuration already.

        Raises UserError naming every difference where it is bound to another.
        """
        found = self.get_meta(name)
        if found is None:
            return False
        now = orjson.loads(orjson.dumps(fingerprint))
        changed = [
            f"{field} was {found.get(field)!r}, now {now.get(field)!r}"
            for field in sorted(found.keys() | now.keys())
            if found.get(field) != now.get(field)
        ]
        if changed:
            raise UserError(
                f"{self.path.parent}: holds a run with another configuration: "
                f"{'; '.join(changed)}; choose another --out or repeat the old settings"
            )
        return True

    def get_meta(self, name: str) -> Any:
        """A JSON value kept beside the opinions, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else orjson.loads(row[0])

    def set_meta(self, name: str, value: Any) -> None:
        """Keep a JSON value."""
        self._db.execute(
            "INSERT INTO meta VALUES (?, ?) "
            "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (name, orjson.dumps(value)),
        )

    # --- opinions ---------------------------------------------------------------------------

    def find(
        self, keys: Sequence[bytes], expert: str, round_: int
    ) -> dict[bytes, tuple[int, Opinion]]:
        """Stored opinions by key, each with the unit of input that asked first."""
        found: dict[bytes, tuple[int, Opinion]] = {}
        for low in range(0, len(keys), 500):
            part = keys[low : low + 500]
            marks = ",".join("?" * len(part))
            rows = self._db.execute(
                "SELECT key, unit, payload FROM opinions "
                f"WHERE key IN ({marks}) AND expert = ? AND round = ?",
                (*part, expert, round_),
            )
            found.update({key: (unit, Opinion.from_json(body)) for key, unit, body in rows})
        return found

    def add(
        self,
        expert: str,
        round_: int,
        unit: int,
        opinions: Sequence[tuple[bytes, Opinion]],
        seconds: float,
    ) -> None:
        """Write one finished batch, all of it or nothing."""
        cost = (
            sum(opinion.prompt_tokens for _, opinion in opinions),
            sum(opinion.new_tokens for _, opinion in opinions),
        )
        with self._transaction():
            self._db.executemany(
                "INSERT INTO opinions VALUES (?, ?, ?, ?, 1, ?) "
                "ON CONFLICT (key, expert, round) DO UPDATE SET asked = asked + 1",
                [(key, expert, round_, unit, opinion.to_json()) for key, opinion in opinions],
            )
            self._db.execute(
                "INSERT INTO requests VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)",
                (expert, round_, unit, len(opinions), *cost, seconds),
            )

    def totals(self) -> dict[str, dict[str, float]]:
        """Per expert: questions asked, tokens and seconds, over all sessions of the run."""
        rows = self._db.execute(
            "SELECT expert, SUM(questions), SUM(prompt_tokens), SUM(new_tokens), SUM(seconds) "
            "FROM requests GROUP BY expert ORDER BY MIN(batch)"
        )
        names = ("questions", "prompt_tokens", "new_tokens", "seconds")
        return {expert: dict(zip(names, values, strict=True)) for expert, *values in rows}

    # --- records that later stages look up by position ----------------------------------------

    def add_records(self, records: Iterable[tuple[int, str, Any]]) -> None:
        """Keep (position, id, body as JSON) for `records_at`."""
        with self._transaction():
            self._db.executemany(
                "INSERT OR IGNORE INTO records VALUES (?, ?, ?)",
                ((position, id_, orjson.dumps(body)) for position, id_, body in records),
            )

    def records_at(self, positions: Sequence[int]) -> dict[int, tuple[str, Any]]:
        """(id, body) by position."""
        found: dict[int, tuple[str, Any]] = {}
        for low in range(0, len(positions), 500):
            part = positions[low : low + 500]
            rows = self._db.execute(
                f"SELECT position, id, body FROM records WHERE position IN "
                f"({','.join('?' * len(part))})",
                [int(position) for position in part],
            )
            found.update({position: (id_, orjson.loads(body)) for position, id_, body in rows})
        return found


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Elapsed wall time."""
        return time.perf_counter() - self._start
