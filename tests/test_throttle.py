"""How many requests may be in flight."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from robustft.engines.throttle import Throttle


async def in_flight(throttle: Throttle) -> int:
    """How many more slots are to be had at once."""
    async with contextlib.AsyncExitStack() as held:
        for count in range(1000):
            try:
                await asyncio.wait_for(held.enter_async_context(throttle.slot()), 0.01)
            except TimeoutError:
                return count
    raise AssertionError("no end of slots")


def test_a_burst_of_refusals_halves_the_slots_once() -> None:
    async def play() -> None:
        throttle = Throttle(8, patience=60)
        async with contextlib.AsyncExitStack() as held:
            begun = [await held.enter_async_context(throttle.slot()) for _ in range(8)]
            assert all(throttle.refused(one) for one in begun)
            assert throttle.slots == 4
            assert await in_flight(throttle) == 0
        assert await in_flight(throttle) == 4

    asyncio.run(play())


def test_as_many_answers_as_slots_add_one_up_to_the_most() -> None:
    async def play() -> None:
        throttle = Throttle(5, patience=60)
        async with throttle.slot() as began:
            throttle.refused(began)
        seen = []
        for _ in range(20):
            throttle.answered()
            seen.append(throttle.slots)
        assert seen == [3] * 2 + [4] * 4 + [5] * 14
        assert await in_flight(throttle) == 5

    asyncio.run(play())


def test_slots_double_every_round_until_an_answer_is_slow() -> None:
    async def play() -> None:
        throttle = Throttle(100, patience=60)
        assert await in_flight(throttle) == 16
        for _ in range(16):
            throttle.answered()
        assert throttle.slots == await in_flight(throttle) == 32
        for _ in range(50):
            throttle.answered(quick=False)
        assert throttle.slots == 32
        for _ in range(32 + 33):
            throttle.answered()
        assert throttle.slots == await in_flight(throttle) == 34

    asyncio.run(play())


def test_slots_double_up_to_the_most() -> None:
    async def play() -> None:
        throttle = Throttle(20, patience=60)
        for _ in range(50):
            throttle.answered()
        assert throttle.slots == await in_flight(throttle) == 20

    asyncio.run(play())


def test_one_slot_is_left() -> None:
    async def play() -> None:
        throttle = Throttle(3, patience=60)
        for _ in range(9):
            async with throttle.slot() as began:
                assert throttle.refused(began)
        assert throttle.slots == await in_flight(throttle) == 1

    asyncio.run(play())


def test_refusals_count_as_failures_where_nothing_else_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    throttle = Throttle(1, patience=60)
    assert throttle.refused(0)
    now = 159.0
    assert throttle.refused(0)
    throttle.answered()
    now = 165.0
    assert throttle.refused(0)
    now = 225.0
    assert not throttle.refused(0)


def test_a_rest_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last request of a batch may have ended otherwise; the next batch comes much later."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    throttle = Throttle(1, patience=60)
    assert throttle.refused(0)
    now = 500.0
    assert throttle.refused(0)
    now = 559.0
    assert throttle.refused(0)
    now = 560.0
    assert not throttle.refused(0)
