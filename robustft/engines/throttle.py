"""How many requests of a kind may be in flight at a server: as many as it takes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

_FIRST = 16


class Throttle:
    """Slots for requests: more after quick answers, half as many after a refusal.

    One more for each answer, which doubles them every round, up to the first refusal or slow answer
    (slow start, Jacobson 1988), then one more a round (additive increase, multiplicative decrease,
    Chiu and Jain 1989). Slow answers add none: requests would wait there, past their time. All on
    one event loop.

    Args:
        most: slots at most.
        patience: seconds in which nothing but refusals came, after which they count as failures.
    """

    def __init__(self, most: int, patience: float) -> None:
        self.slots = min(_FIRST, most)
        self._most = most
        self._patience = patience
        self._free = asyncio.Semaphore(self.slots)
        self._owed = 0  # slots that are no more, once they come free
        self._cuts = 0
        self._answers = 0  # since the number of slots changed
        self._doubling = True
        self._refusing_since: float | None = None
        self._refused_at = 0.0

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """One request in flight; what it yields tells `refused` when that began."""
        await self._free.acquire()
        try:
            yield self._cuts
        finally:
            self._release()

    def _release(self) -> None:
        if self._owed:
            self._owed -= 1
        else:
            self._free.release()

    def answered(self, *, quick: bool = True) -> None:
        """A request was answered; `quick`: far sooner than it had to be."""
        self._refusing_since = None
        self._doubling &= quick
        self._answers += quick and self.slots < self._most
        if self._answers == (1 if self._doubling else self.slots):
            self._answers = 0
            self.slots += 1
            self._release()

    def refused(self, began: int) -> bool:
        """A request was one too many; whether it is worth another try."""
        if began == self._cuts and self.slots > 1:  # else it was in flight before the last cut
            self._owed += self.slots // 2
            self.slots -= self.slots // 2
            self._cuts += 1
            self._answers = 0
        self._doubling = False
        now = time.monotonic()
        rested = now - self._refused_at > self._patience  # nothing was asked, or nothing came
        if self._refusing_since is None or rested:
            self._refusing_since = now
        self._refused_at = now
        return now - self._refusing_since < self._patience
