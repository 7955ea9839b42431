"""JSON over HTTP to a server that is not trusted: when to ask again, and how many at a time.

Every request is tried again after what may pass (no connection, 408, 5xx, a garbled reply), with
exponential back-off, and given up for good on anything else. One that comes too soon (429) waits as
long as others are answered, and fewer are sent. A request given up is a `Failure` in its place;
many in a row, and none answered in between, are a server lost. Requests refused for what they are
(400) may be too long, each of them: then one cut short is answered.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import tenacity

from robustft.engines import Failure
from robustft.engines.connection import (
    LARGEST_REPLY,
    TOO_MANY,
    Connection,
    NoAnswer,
    RequestError,
    ServerAway,
)
from robustft.engines.throttle import Throttle
from robustft.errors import EngineLost

_T = TypeVar("_T")
# Whether a request has been tried enough: its last error, the tries so far and their seconds.
_Enough: TypeAlias = Callable[[RequestError, int, float], bool]
_log = logging.getLogger("robustft")
_LOST_AFTER = 64  # requests given up in a row
_REFUSED = {400, 413, 422}  # this request, too long for the model say, by a server that is there
_SHORT = 16  # tokens or characters that no server finds too long
_TRIES = 2  # of what only tells whether the server takes a request


class _TooSoon(RequestError):
    """The server takes no more requests for now."""


class JsonClient:
    """Posts JSON to one server, many requests at a time, from any thread.

    Args:
        base_url: http(s) address, with its path ("http://localhost:8000/v1").
        key_variable: the environment variable that holds the key, sent as a bearer token where it
            is set. The key is never logged, raised or kept anywhere but in memory.
        concurrency: requests in flight at most; fewer where the server says that they are too many.
        timeout: seconds for one try of one request, from connecting to the last byte.
        retries: tries after the first.
        backoff: seconds before the first retry; doubles with each.
        longest_wait: seconds between two tries at most, whatever Retry-After asks for.
        largest: bytes of a reply at most, after decompression.

    Raises:
        UserError: the address or the key is malformed, or the proxy or the certificates that the
            environment names cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 128,
        timeout: float = 300.0,
        retries: int = 5,
        backoff: float = 0.5,
        longest_wait: float = 60.0,
        largest: int = LARGEST_REPLY,
    ) -> None:
        self._connection = Connection(
            base_url,
            key_variable=key_variable,
            most=concurrency,
            timeout=timeout,
            largest=largest,
        )
        self.base_url = self._connection.base_url
        self.concurrency = concurrency
        self.waited_out = False  # whether a request of `ask` found it away at every try
        self._timeout = timeout
        self._tries = retries + 1
        self._backoff = backoff
        self._longest_wait = longest_wait
        self._patience = 2 * longest_wait  # with refusals for number alone
        self._told = False  # that it takes fewer requests
        self._given_up = 0  # in a row
        self._refused = 0  # in a row, none of them given up
        self._last_failure = ""
        # How many texts the server takes is not learnt from questions for a letter.
        self._throttles: dict[int | None, Throttle] = {}
        self._slots = asyncio.Semaphore(concurrency)

    def close(self) -> None:
        """Close the connections and end their thread."""
        self._connection.close()

    def cancel(self) -> None:
        """Give up what other threads are waiting for: they get a CancelledError."""
        self._connection.cancel()

    def ask(self, path: str, body: Any, read: Callable[[bytes], _T]) -> _T:
        """One request, `body` None for a GET; raises RequestError where it fails.

        It is tried twice, to see whether the server takes it. One that is away for a moment is
        waited for with all the tries, for twice the longest wait at most, and once only: a proxy
        may say so of every request of a kind. `waited_out` tells that it was in vain.

        Raises EngineLost where it comes too soon for minutes: that tells nothing of the request.
        """

        def enough(error: RequestError, tried: int, seconds: float) -> bool:
            late = seconds >= self._patience
            if error.status == TOO_MANY:
                return late
            # Where nothing has ever answered nobody is there, rather than away.
            away = isinstance(error, ServerAway) and self._connection.met
            waited_for = away and not late and not self.waited_out
            return tried >= (max(_TRIES, self._tries) if waited_for else _TRIES)

        try:
            return self._connection.run(self._persist_in_slot(path, body, read, enough))
        except RequestError as error:
            if error.status == TOO_MANY:
                raise EngineLost(
                    f"{self.base_url}: {error}, and nothing else for {self._patience:g} s"
                ) from None
            self.waited_out |= isinstance(error, ServerAway)
            raise

    def ask_all(
        self, path: str, bodies: Sequence[Any], readers: Sequence[Callable[[bytes], _T]]
    ) -> list[_T | Failure]:
        """Post every body; `readers` turn the replies into results, ValueError where they cannot.

        A sound reply without an answer is theirs to turn into a `Failure`, or to raise `NoAnswer`
        at: it is not asked for again, and no server is lost by it.

        Raises:
            EngineLost: dozens of requests in a row got no usable reply, nor does the first of
                these; or they were refused, and a short one as well.
        """
        if self._refused >= _LOST_AFTER and bodies:
            self._connection.run(self._check_refusals(path, _cut_short(bodies[0])))
        return self._connection.run(self._ask_all(path, bodies, readers))

    async def _check_refusals(self, path: str, short: Any) -> None:
        """Raise EngineLost where a request is refused for more than its length."""

        def enough(error: RequestError, tried: int, seconds: float) -> bool:
            return seconds >= self._patience if error.status == TOO_MANY else tried >= self._tries

        try:
            await self._persist_in_slot(path, short, bytes, enough)
        except RequestError as error:
            if error.passing:  # a broken connection, say, which tells nothing of a request's length
                return
            raise EngineLost(
                f"{self.base_url}: the last {self._refused} requests were refused, and so is a "
                f"short one: {error}"
            ) from None
        self._refused = 0

    async def _ask_all(
        self, path: str, bodies: Sequence[Any], readers: Sequence[Callable[[bytes], _T]]
    ) -> list[_T | Failure]:
        rest = zip(bodies, readers, strict=True)
        found: list[_T | Failure] = []
        lost = self._given_up  # in the batches before this one, whose answers are kept
        if lost >= _LOST_AFTER:
            # Is it there again, as for who asks long after? One request tells.
            found += [await self._ask_or_fail(path, *first) for first in itertools.islice(rest, 1)]
            if self._given_up > lost:
                raise EngineLost(
                    f"{self.base_url}: the last {lost} requests failed, and so does one more: "
                    f"{self._last_failure}"
                )
        found += await asyncio.gather(*(self._ask_or_fail(path, *one) for one in rest))
        return found

    async def _ask_or_fail(self, path: str, body: Any, read: Callable[[bytes], _T]) -> _T | Failure:
        too_soon = tenacity.AsyncRetrying(
            wait=self._wait, retry=tenacity.retry_if_exception_type(_TooSoon)
        )
        found: _T | Failure = await too_soon(self._ask_in_turn, path, body, read)
        return found

    async def _ask_in_turn(self, path: str, body: Any, read: Callable[[bytes], _T]) -> _T | Failure:
        """One request in a slot of its throttle; _TooSoon where it is to come back later."""
        length = body.get("max_tokens", body.get("max_completion_tokens"))
        if length not in self._throttles:
            self._throttles[length] = Throttle(self.concurrency, self._patience)
        throttle = self._throttles[length]
        async with throttle.slot() as began, self._slots:
            # A server that is gone is not worth the full patience for every request in the batch.
            tries = 1 if self._given_up >= _LOST_AFTER else self._tries

            def enough(error: RequestError, tried: int, seconds: float) -> bool:
                return error.status == TOO_MANY or tried >= tries  # too many: out of the slot

            asked = time.monotonic()
            try:
                found: _T | Failure
                found = await self._persist(path, body, read, enough)
            except NoAnswer as error:
                found = Failure(str(error))
            except RequestError as error:
                if error.status == TOO_MANY and self._come_back(throttle, began):
                    raise _TooSoon(str(error), retry_after=error.retry_after) from None
                refused = error.status in _REFUSED
                self._given_up = 0 if refused else self._given_up + 1
                self._refused = self._refused + 1 if refused else 0
                self._last_failure = str(error)
                if error.status == TOO_MANY:
                    return Failure(f"{error} (and nothing else for {self._patience:g} s)")
                return Failure(f"{error} ({tries} tries)" if error.passing else str(error))
            self._given_up = self._refused = 0
            throttle.answered(quick=time.monotonic() - asked < self._timeout / 4)
            return found

    def _come_back(self, throttle: Throttle, began: int) -> bool:
        """Whether a request that was one too many is worth another try."""
        if not self._told:
            self._told = True
            _log.warning(
                "%s: refuses some requests as too many at a time; it gets as many as it takes",
                self.base_url,
            )
        return throttle.refused(began)

    async def _persist_in_slot(
        self, path: str, body: Any, read: Callable[[bytes], _T], enough: _Enough
    ) -> _T:
        async with self._slots:
            return await self._persist(path, body, read, enough)

    async def _persist(
        self, path: str, body: Any, read: Callable[[bytes], _T], enough: _Enough
    ) -> _T:
        """One request, tried again after what may pass until it was tried `enough`."""

        def stop(state: tenacity.RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            seconds = state.seconds_since_start or 0.0
            return not isinstance(error, RequestError) or enough(
                error, state.attempt_number, seconds
            )

        patient = tenacity.AsyncRetrying(
            stop=stop,
            wait=self._wait,
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, RequestError) and error.passing
            ),
            reraise=True,
        )
        found: _T = await patient(self._connection.exchange, path, body, read)
        return found

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds until the next try: what the server asks for, else doubling, with jitter."""
        growing = tenacity.wait_exponential(
            multiplier=self._backoff, max=self._longest_wait / 2
        ) + tenacity.wait_random(0, self._backoff)
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after if isinstance(error, RequestError) else 0.0
        return min(max(asked, float(growing(state))), self._longest_wait)


def _cut_short(body: dict[str, Any]) -> dict[str, Any]:
    """The same request with the beginning alone of its prompt, or of each of its messages."""
    if "prompt" in body:
        return body | {"prompt": body["prompt"][:_SHORT]}
    cut = [said | {"content": said["content"][:_SHORT]} for said in body["messages"]]
    return body | {"messages": cut}
