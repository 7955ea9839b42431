"""Results kept by content in one SQLite file that several processes may share."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from robustft.errors import UserError


def content_key(*parts: object) -> bytes:
    """16 bytes that tell `parts` (anything orjson can write) from any others."""
    return hashlib.blake2b(
        orjson.dumps(parts, option=orjson.OPT_SORT_KEYS), digest_size=16
    ).digest()


class Cache:
    """Key to bytes. A key is a digest of everything the value depends on, so none ever changes.

    The file is made when it is first needed; any thread may use it. Raises UserError where it
    cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()  # a transaction is the connection's, not the thread's

    @cached_property
    def _db(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(
                self.path, isolation_level=None, timeout=120, check_same_thread=False
            )
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.execute(
                "CREATE TABLE IF NOT EXISTS results (key BLOB PRIMARY KEY, value BLOB NOT NULL) "
                "WITHOUT ROWID"
            )
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{self.path}: cannot be used as a cache: {error}") from error
        return database

    @contextlib.contextmanager
    def _telling(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                yield self._db
        except sqlite3.Error as error:  # disk full, damaged file
            raise UserError(
                f"{self.path}: {error}; what is finished is kept, the same command resumes"
            ) from error

    def find(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that are there."""
        found: dict[bytes, bytes] = {}
        with self._telling() as database:
            for low in range(0, len(keys), 500):
                part = keys[low : low + 500]
                marks = ",".join("?" * len(part))
                found.update(
                    database.execute(f"SELECT key, value FROM results WHERE key IN ({marks})", part)
                )
        return found

    def add(self, values: Mapping[bytes, bytes]) -> None:
        """Keep all of `values` or, when killed, none."""
        with self._telling() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                rows = values.items()
                database.executemany("INSERT OR IGNORE INTO results VALUES (?, ?)", rows)
                database.execute("COMMIT")
            finally:
                if database.in_transaction:
                    database.execute("ROLLBACK")

    def get(self, key: bytes) -> Any:
        """One JSON value, or None."""
        value = self.find([key]).get(key)
        return None if value is None else orjson.loads(value)

    def put(self, key: bytes, value: Any) -> None:
        """Keep one JSON value."""
        self.add({key: orjson.dumps(value)})

    def replace(self, key: bytes, value: Any) -> None:
        """Keep one JSON value that may change: a measurement, not a result."""
        with self._telling() as database:
            row = key, orjson.dumps(value)
            database.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", row)

    def close(self) -> None:
        """Close the file, if it was opened."""
        if "_db" in vars(self):
            self._db.close()
            del self._db
