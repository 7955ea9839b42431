"""Ids of the records of one input: its own or their positions, no two alike."""

from __future__ import annotations

from array import array
from typing import Any


class UniqueIds:
    """Makes ids unique with "#2", "#3", … in 8 bytes a slot: an open-addressing set of hashes."""

    def __init__(self) -> None:
        self._bare = -1  # index of the first record with an id of its own
        self._table = array("Q", bytes(8 << 10))
        self._used = 0

    def unique(self, own: Any, index: int) -> str:
        """Return the id of record `index`: its own id as text, or its index, made unique."""
        named = (isinstance(own, str) and own.strip()) or type(own) is int
        if not named and self._bare < 0:
            return str(index)
        if self._bare < 0:
            self._bare = index
        wanted = str(own) if named else str(index)
        if self._take(wanted):
            return wanted
        # The numbers taken follow one another, but for ids that have one of their own; so doubling
        # and halving finds a free one soon, and none need be remembered.
        taken, free = 1, 2
        while self._has(f"{wanted}#{free}"):
            taken, free = free, 2 * free
        while free - taken > 1:
            middle = (taken + free) // 2
            if self._has(f"{wanted}#{middle}"):
                taken = middle
            else:
                free = middle
        self._insert(f"{wanted}#{free}")
        return f"{wanted}#{free}"

    def _take(self, name: str) -> bool:
        """Claim a name; False if it is taken, by an earlier bare index too."""
        if name.isascii() and name.isdigit() and len(name) < 19 and int(name) < self._bare:
            return name != str(int(name)) and self._insert(name)
        return self._insert(name)

    def _has(self, name: str) -> bool:
        return self._table[self._slot(_hash(name))] != 0

    def _insert(self, name: str) -> bool:
        value = _hash(name)
        if self._used * 2 >= len(self._table):
            old, self._table = self._table, array("Q", bytes(16 * len(self._table)))
            for entry in old:
                if entry:
                    self._table[self._slot(entry)] = entry
        slot = self._slot(value)
        if self._table[slot]:
            return False
        self._table[slot] = value
        self._used += 1
        return True

    def _slot(self, value: int) -> int:
        mask = len(self._table) - 1
        slot = value & mask
        while (entry := self._table[slot]) and entry != value:
            slot = (slot + 1) & mask
        return slot


def _hash(name: str) -> int:
    """64 bits, never 0, salted anew by every process: no name can be made to collide."""
    return hash(name) & (1 << 64) - 1 or 1
