"""Results kept by content in one SQLite file that several processes may share."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping, Sequence
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
    """Key to bytes. A key is a digest of everything the value depends on, so none ever changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=120)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS results (key BLOB PRIMARY KEY, value BLOB NOT NULL) "
                "WITHOUT ROWID"
            )
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path}: cannot be used as a cache: {error}") from error

    def find(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that are there."""
        found: dict[bytes, bytes] = {}
        for low in range(0, len(keys), 500):
            part = keys[low : low + 500]
            marks = ",".join("?" * len(part))
            found.update(
                self._db.execute(f"SELECT key, value FROM results WHERE key IN ({marks})", part)
            )
        return found

    def add(self, values: Mapping[bytes, bytes]) -> None:
        """Keep all of `values` or, when killed, none."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("INSERT OR IGNORE INTO results VALUES (?, ?)", values.items())
        self._db.execute("COMMIT")

    def get(self, key: bytes) -> Any:
        """One JSON value, or None."""
        value = self.find([key]).get(key)
        return None if value is None else orjson.loads(value)

    def put(self, key: bytes, value: Any) -> None:
        """Keep one JSON value."""
        self.add({key: orjson.dumps(value)})

    def replace(self, key: bytes, value: Any) -> None:
        """Keep one JSON value that may change: a measurement, not a result."""
        self._db.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (key, orjson.dumps(value)))

    def close(self) -> None:
        """Close the file."""
        self._db.close()
