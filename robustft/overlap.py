"""Work that mostly waits for others, several pieces of it at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread
from typing import TypeVar

_K = TypeVar("_K")
_T = TypeVar("_T")
_SECONDS_TO_END = 0.1  # between two looks whether cancelled jobs have ended


def in_order(
    jobs: Iterable[tuple[_K, Callable[[], _T]]],
    at_a_time: int,
    cancel: Callable[[], object] = lambda: None,
) -> Generator[tuple[_K, _T]]:
    """Yield (key, result) of every (key, job) in their order; close it where you stop early.

    Parameters
    ----------
    jobs: drawn in the caller's thread, no more than twice `at_a_time` before their results.
    at_a_time: threads to run them in; with 1 they run in the caller's, one after the other.
    cancel: makes jobs at work fail soon; called where the caller is interrupted or has closed this.
        Where a job fails, the others at work come to their ends first.
    """
    if at_a_time == 1:
        for key, job in jobs:
            yield key, job()
        return
    begun: deque[tuple[_K, Future[_T]]] = deque()
    with ThreadPoolExecutor(at_a_time) as pool:
        try:
            for key, job in jobs:
                begun.append((key, pool.submit(job)))
                if len(begun) == 2 * at_a_time:
                    yield begun[0][0], begun[0][1].result()
                    begun.popleft()
            while begun:
                yield begun[0][0], begun[0][1].result()
                begun.popleft()
        except BaseException as error:
            stop = (lambda: None) if isinstance(error, Exception) else cancel
            stop()
            ending = Thread(target=pool.shutdown, kwargs={"cancel_futures": True})
            ending.start()
            while ending.is_alive():
                stop()  # again and again: a job may just have been between two questions
                ending.join(_SECONDS_TO_END)
            raise
