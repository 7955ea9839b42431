"""Work that mostly waits for others, several pieces of it at a time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Thread
from typing import TypeVar

from robustft.engines import Engine

_K = TypeVar("_K")
_T = TypeVar("_T")
_SECONDS_TO_END = 0.1  # between two looks whether cancelled jobs have ended


def asked(
    engine: Engine | None, jobs: Iterable[tuple[_K, Callable[[], _T]]]
) -> contextlib.closing[Generator[tuple[_K, _T]]]:
    """Every (key, what its job says), in order, as a `with` block's own.

    A server is kept busy by as many jobs as its engine says; others, and who asks none, do one
    after the other.
    """
    if engine is None:
        return contextlib.closing(in_order(jobs, 1))
    return contextlib.closing(in_order(jobs, engine.at_a_time, engine.cancel))


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
    cancel: makes the jobs at work fail soon; called where one has failed, or the caller, who may
        have been interrupted or have closed this. Results before the failed one's are yielded.
    """
    if at_a_time == 1:
        for key, job in jobs:
            yield key, job()
        return
    begun: deque[tuple[_K, Future[_T]]] = deque()
    pool = ThreadPoolExecutor(at_a_time)
    try:
        for key, job in jobs:
            begun.append((key, pool.submit(job)))
            if len(begun) == 2 * at_a_time:
                yield begun[0][0], begun[0][1].result()
                begun.popleft()
        while begun:
            yield begun[0][0], begun[0][1].result()
            begun.popleft()
    except BaseException:
        _end(pool, cancel)
        raise
    pool.shutdown()


def _end(pool: ThreadPoolExecutor, cancel: Callable[[], object]) -> None:
    """Cancel the jobs and wait until they have ended; whoever interrupts that waits no less."""
    ended = Event()  # a join that was interrupted would take its thread for ended

    def shut() -> None:
        pool.shutdown(cancel_futures=True)
        ended.set()

    Thread(target=shut).start()
    interrupt, over = None, False
    while not over:
        try:
            cancel()  # again and again: a job may just have been between two questions
            over = ended.wait(_SECONDS_TO_END)
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
