"""Results kept by content: a file that appears when it is needed, and one line where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustft.cache import Cache
from robustft.errors import UserError


def test_the_file_appears_when_it_is_needed(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "cache.sqlite")
    assert list(tmp_path.iterdir()) == []
    cache.add({b"a": b"1", b"b": b"2"})
    assert Cache(cache.path).find([b"a", b"c"]) == {b"a": b"1"}


def test_a_file_that_is_no_cache_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache.sqlite").write_text("mine, and longer than a header of sqlite " * 9)
    with pytest.raises(UserError, match=r"cache\.sqlite: cannot be used as a cache: file is not"):
        Cache(tmp_path / "cache.sqlite").get(b"a")


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache.sqlite")
    cache.add({b"a": b"1"})
    cache._db.execute("PRAGMA max_page_count=3")
    with pytest.raises(UserError, match=r"cache\.sqlite: database or disk is full; what is finish"):
        cache.add({b"b": b"2", b"c": bytes(1 << 16)})
    cache.add({b"d": b"4"})
    assert cache.find([b"a", b"b", b"c", b"d"]) == {b"a": b"1", b"d": b"4"}
