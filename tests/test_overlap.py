"""Several jobs at a time, results in order."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from robustft.overlap import in_order


def test_results_come_in_order_whatever_takes_longest() -> None:
    def job(number: int) -> Callable[[], int]:
        def work() -> int:
            time.sleep(0.02 * (number % 3 == 0))
            return number * number

        return work

    found = list(in_order(((n, job(n)) for n in range(20)), 4))
    assert found == [(n, n * n) for n in range(20)]
    assert list(in_order([], 4)) == []


def test_jobs_run_side_by_side_and_few_are_drawn_ahead() -> None:
    drawn: list[int] = []
    meeting = threading.Barrier(3, timeout=60)

    def jobs() -> Iterator[tuple[int, Callable[[], int]]]:
        for number in range(12):
            drawn.append(number)
            yield number, meeting.wait

    with contextlib.closing(in_order(jobs(), 3)) as results:
        for number, _ in results:
            assert len(drawn) <= number + 6


def test_one_at_a_time_stays_in_the_thread_of_the_caller() -> None:
    here = threading.current_thread
    assert list(in_order([(n, here) for n in range(3)], 1)) == [(n, here()) for n in range(3)]


def test_where_a_job_fails_what_is_before_it_counts_and_the_rest_is_cancelled() -> None:
    failed, cancelled = threading.Event(), threading.Event()

    def fail() -> None:
        failed.set()
        raise ValueError("no")

    def hang() -> None:
        assert cancelled.wait(60)

    jobs = [(0, lambda: failed.wait(60)), (1, fail), (2, hang), (3, hang)]
    with contextlib.closing(in_order(jobs, 2, cancelled.set)) as results:
        assert next(results) == (0, True)
        with pytest.raises(ValueError, match="no"):
            next(results)
    assert cancelled.is_set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, None])
def test_an_interrupted_or_closed_run_cancels_what_is_at_work(error: type | None) -> None:
    cancelled = threading.Event()

    def hang() -> None:
        if not cancelled.wait(60):
            pytest.fail("not cancelled")
        raise ValueError("cancelled")

    def jobs() -> Iterator[tuple[int, Callable[[], None]]]:
        yield 0, lambda: None
        for number in range(1, 4):
            yield number, hang
        if error is not None:
            raise error

    with (
        pytest.raises(error) if error else contextlib.nullcontext(),
        contextlib.closing(in_order(jobs(), 2, cancelled.set)) as results,
    ):
        assert next(results) == (0, None)
        if error:
            next(results)
    assert cancelled.is_set()


def test_ctrl_c_cancels_the_job_that_is_waited_for() -> None:
    cancelled = threading.Event()

    def hang() -> None:
        time.sleep(0.1)  # else the caller may still be starting this thread
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if not cancelled.wait(60):
            pytest.fail("not cancelled")

    with pytest.raises(KeyboardInterrupt):
        list(in_order([(0, hang)], 2, cancelled.set))
    assert cancelled.is_set()


@pytest.mark.parametrize("first", [KeyboardInterrupt, ValueError])
def test_ctrl_c_while_jobs_are_ended_is_not_lost(first: type[BaseException]) -> None:
    cancelled = 0

    def cancel() -> None:
        nonlocal cancelled
        cancelled += 1
        if cancelled in (3, 5):
            signal.raise_signal(signal.SIGINT)

    def hang() -> None:
        while cancelled < 8:
            time.sleep(0.01)

    def jobs() -> Iterator[tuple[int, Callable[[], None]]]:
        yield 0, hang
        raise first

    with pytest.raises(KeyboardInterrupt):
        list(in_order(jobs(), 2, cancel))
    assert cancelled >= 8
