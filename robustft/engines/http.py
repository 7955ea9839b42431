"""JSON over HTTP to a server that is not trusted: bounded in number, size and time.

Every request is tried again after what may pass (no connection, 408, 5xx, a garbled reply), with
exponential back-off, and given up for good on anything else. One that comes too soon (429) waits as
long as others are answered, and fewer are sent. A request given up is a `Failure` in its place;
many in a row, and none answered in between, are a server lost. Requests refused for what they are
(400) may be too long, each of them: then one cut short is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import orjson
import tenacity

import robustft
from robustft.engines import Failure
from robustft.engines.throttle import Throttle
from robustft.errors import EngineLost, UserError

_T = TypeVar("_T")
_log = logging.getLogger("robustft")
_LARGEST_REPLY = 32 * 2**20  # bytes
_LARGEST_ERROR = 64 * 2**10  # bytes of an error's body that are read
_LOST_AFTER = 64  # requests given up in a row
_REFUSED = {400, 413, 422}  # this request, too long for the model say, by a server that is there
_SHORT = 16  # tokens or characters that no server finds too long
_TOO_MANY = 429
_PASSING = {408, 409, 425, _TOO_MANY, *range(500, 600)}
_AWAY = {502, 503, 504}  # a proxy that finds no server behind it
_CONNECTIONS = 32  # of one httpx2 client, which looks at all of them at every request
_TRIES = 2  # of what only tells whether the server takes a request


class RequestError(Exception):
    """One try that failed. `status` is that of the HTTP reply, 0 without one."""

    def __init__(
        self, reason: str, *, status: int = 0, passing: bool = True, retry_after: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.passing = passing  # worth another try
        self.retry_after = retry_after  # seconds


class _TooSoon(RequestError):
    """The server takes no more requests for now."""


class ServerAway(RequestError):
    """No connection, or a broken one, or a proxy that finds no server behind it."""


class NoAnswer(RequestError):
    """A sound reply that holds no answer, and would hold none if asked for again."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, status=200, passing=False)


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
        largest: int = _LARGEST_REPLY,
    ) -> None:
        self.base_url = checked_address(base_url)
        self._key = _key(key_variable)
        self._timeout = timeout
        self._tries = retries + 1
        self._backoff = backoff
        self._longest_wait = longest_wait
        self._patience = 2 * longest_wait  # with refusals for number alone
        self._told = False  # that it takes fewer requests
        self._met = False  # whether anything has ever answered there
        self.waited_out = False  # whether a request of `ask` found it away at every try
        self._largest = largest
        self._given_up = 0  # in a row
        self._refused = 0  # in a row, none of them given up
        self._last_failure = ""
        self.concurrency = concurrency
        self._in_flight: set[Future[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=_turn, args=(self._loop,), name="robustft-http", daemon=True
        )
        self._thread.start()
        try:
            clients = self._run(self._open())
        except (ValueError, ImportError, OSError) as error:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise UserError(
                f"the proxy or the certificates that the environment names cannot be used: {error}"
            ) from None
        # A client that is dropped takes its connections and its thread with it.
        self._end = weakref.finalize(self, _end, self._loop, clients)
        self._end.atexit = False

    async def _open(self) -> list[httpx2.AsyncClient]:
        # How many texts the server takes is not learnt from questions for a letter.
        self._throttles: dict[int | None, Throttle] = {}
        self._slots = asyncio.Semaphore(self.concurrency)
        headers = {
            "accept": "application/json",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": f"robustft/{robustft.__version__}",
        }
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        limits = httpx2.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
        certificates = httpx2.create_ssl_context()  # which takes a while: once
        clients = [
            httpx2.AsyncClient(
                headers=headers, limits=limits, timeout=self._timeout, follow_redirects=False,
                verify=certificates,
            )
            for _ in range(0, self.concurrency, _CONNECTIONS)
        ]  # fmt: skip
        # A client for each request in flight, the last ones given back first: a few requests at a
        # time share the connections of one.
        self._free = [client for client in clients for _ in range(_CONNECTIONS)]
        return clients

    def close(self) -> None:
        """Close the connections and end the thread."""
        self._end()
        self._thread.join()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """`work`, done on the client's own loop: the caller may be running one itself."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._in_flight.add(future)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            self._in_flight.discard(future)

    def cancel(self) -> None:
        """Give up what other threads are waiting for: they get a CancelledError."""
        for future in list(self._in_flight):
            future.cancel()

    # --- requests ----------------------------------------------------------------------------

    def ask(self, path: str, body: Any, read: Callable[[bytes], _T]) -> _T:
        """One request, `body` None for a GET; raises RequestError where it fails.

        It is tried twice, to see whether the server takes it. One that is away for a moment is
        waited for with all the tries, for twice the longest wait at most, and once only: a proxy
        may say so of every request of a kind. `waited_out` tells that it was in vain.

        Raises EngineLost where it comes too soon for minutes: that tells nothing of the request.
        """
        began = time.monotonic()

        def tries(error: BaseException) -> int:
            # Where nothing has ever answered nobody is there, rather than away.
            away = isinstance(error, ServerAway) and self._met
            late = time.monotonic() - began >= self._patience
            return _TRIES if not away or late or self.waited_out else max(_TRIES, self._tries)

        try:
            return self._run(self._persist_in_slot(path, body, read, tries))
        except RequestError as error:
            if error.status == _TOO_MANY:
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
            EngineLost: dozens of requests in a row got no usable reply, or were refused, and a
                short one as well.
        """
        if self._given_up >= _LOST_AFTER:  # the batch before this one, whose answers are kept
            lost = self._given_up
            if not self._in_flight:
                self._given_up = 0  # who asks once more finds out anew
            raise EngineLost(
                f"{self.base_url}: the last {lost} requests failed: {self._last_failure}"
            )
        if self._refused >= _LOST_AFTER and bodies:
            self._run(self._check_refusals(path, _cut_short(bodies[0])))
        return self._run(self._ask_all(path, bodies, readers))

    async def _check_refusals(self, path: str, short: Any) -> None:
        """Raise EngineLost where a request is refused for more than its length."""
        try:
            await self._persist_in_slot(path, short, bytes, lambda _: self._tries)
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
        return await asyncio.gather(
            *(
                self._ask_or_fail(path, body, read)
                for body, read in zip(bodies, readers, strict=True)
            )
        )

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
            asked = time.monotonic()
            try:
                found: _T | Failure
                found = await self._persist(path, body, read, lambda _: tries, apart=_TOO_MANY)
            except NoAnswer as error:
                found = Failure(str(error))
            except RequestError as error:
                if error.status == _TOO_MANY and self._come_back(throttle, began):
                    raise _TooSoon(str(error), retry_after=error.retry_after) from None
                refused = error.status in _REFUSED
                self._given_up = 0 if refused else self._given_up + 1
                self._refused = self._refused + 1 if refused else 0
                self._last_failure = str(error)
                if error.status == _TOO_MANY:
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
        self,
        path: str,
        body: Any,
        read: Callable[[bytes], _T],
        tries: Callable[[BaseException], int],
    ) -> _T:
        async with self._slots:
            return await self._persist(path, body, read, tries)

    async def _persist(
        self,
        path: str,
        body: Any,
        read: Callable[[bytes], _T],
        tries: Callable[[BaseException], int],
        apart: int | None = None,
    ) -> _T:
        """As many tries of one request as `tries` says of an error, more while it comes too soon.

        Replies of the status `apart` end them at once.
        """

        def enough(state: tenacity.RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, RequestError) and error.status == _TOO_MANY:
                return (state.seconds_since_start or 0.0) >= self._patience
            return error is None or state.attempt_number >= tries(error)

        def again(error: BaseException) -> bool:
            return isinstance(error, RequestError) and error.passing and error.status != apart

        patient = tenacity.AsyncRetrying(
            stop=enough,
            wait=self._wait,
            retry=tenacity.retry_if_exception(again),
            reraise=True,
        )
        found: _T = await patient(self._once, path, body, read)
        return found

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds until the next try: what the server asks for, else doubling, with jitter."""
        growing = tenacity.wait_exponential(
            multiplier=self._backoff, max=self._longest_wait / 2
        ) + tenacity.wait_random(0, self._backoff)
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after if isinstance(error, RequestError) else 0.0
        return min(max(asked, float(growing(state))), self._longest_wait)

    async def _once(self, path: str, body: Any, read: Callable[[bytes], _T]) -> _T:
        try:
            async with asyncio.timeout(self._timeout):
                payload = await self._exchange(path, body)
        except (TimeoutError, httpx2.TimeoutException):
            raise RequestError(f"no complete reply in {self._timeout:g} s") from None
        except (httpx2.TransportError, OSError) as error:
            raise ServerAway(self._said(_what_broke(error))) from None
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise RequestError(self._said(_what_broke(error))) from None
        try:
            return read(payload)
        except (ValueError, ArithmeticError, LookupError, RecursionError) as error:
            said = _server_message(payload) or f": {error}"
            raise RequestError(self._said(f"unusable reply{said}")) from None

    async def _exchange(self, path: str, body: Any) -> bytes:
        url = self.base_url + path
        content = None if body is None else orjson.dumps(body)
        method = "GET" if body is None else "POST"
        async with (
            self._connected() as http,
            http.stream(method, url, content=content) as reply,
        ):
            self._met = True
            status = reply.status_code
            if 300 <= status < 400:
                target = self._said(reply.headers.get("location", "nowhere"))
                raise RequestError(
                    f"HTTP {status}: a redirect to {target} is refused; name the server's own "
                    "address as --base-url",
                    status=status,
                    passing=False,
                )
            payload = await self._bounded(reply)
        if status != 200:
            kind = ServerAway if status in _AWAY else RequestError
            raise kind(
                self._said(f"HTTP {status}{_server_message(payload)}"),
                status=status,
                passing=status in _PASSING,
                retry_after=_retry_after(reply.headers.get("retry-after", "")),
            )
        return payload

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[httpx2.AsyncClient]:
        """A client with a connection to spare: there are as many as requests in flight."""
        http = self._free.pop()
        try:
            yield http
        finally:
            self._free.append(http)

    async def _bounded(self, reply: httpx2.Response) -> bytes:
        """The reply's body; of an error only its beginning."""
        good = reply.status_code == 200
        largest = self._largest if good else _LARGEST_ERROR
        parts, size = [], 0
        async for part in reply.aiter_bytes():
            parts.append(part)
            size += len(part)
            if size > largest:
                if good:
                    raise RequestError(f"a reply of more than {largest} bytes")
                break
        return b"".join(parts)[:largest]

    def _said(self, text: str) -> str:
        """What the server or a library says, as one short line that cannot hold the key."""
        if self._key:
            text = text.replace(self._key, "[key]")
        line = " ".join(text.split())[:300]
        return "".join(c if c.isprintable() else "?" for c in line)


def _cut_short(body: dict[str, Any]) -> dict[str, Any]:
    """The same request with the beginning alone of its prompt, or of each of its messages."""
    if "prompt" in body:
        return body | {"prompt": body["prompt"][:_SHORT]}
    cut = [said | {"content": said["content"][:_SHORT]} for said in body["messages"]]
    return body | {"messages": cut}


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    """What a client's thread does: turn the loop until it is stopped."""
    loop.run_forever()
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, clients: Sequence[httpx2.AsyncClient]) -> None:
    """Close the connections, then stop the loop; waits for neither, as any thread may collect."""
    closing = asyncio.run_coroutine_threadsafe(_close(clients), loop)
    # Threadsafe: closing may be over already, this then runs here, and the loop has to wake up.
    closing.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))


async def _close(clients: Sequence[httpx2.AsyncClient]) -> None:
    for client in clients:
        await client.aclose()


def checked_address(base_url: str) -> str:
    """`base_url` without a trailing slash. Raises UserError, never repeating what may be secret."""
    try:
        urlsplit(base_url.strip())  # refuses a broken IPv6 address, which httpx2 would escape
        url = httpx2.URL(base_url.strip())
    except (httpx2.InvalidURL, ValueError, TypeError):
        raise UserError(
            "--base-url: expected an address such as http://localhost:8000/v1"
        ) from None
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(
            "--base-url: expected an http or https address such as http://localhost:8000/v1"
        )
    if url.userinfo or url.query or url.fragment:
        raise UserError(
            "--base-url: expected an address without user name, password, ? and #; keys belong in "
            "the environment (see --key-variable)"
        )
    return str(url).rstrip("/")


def _key(variable: str) -> str:
    """The key in that variable, "" where it is not set."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise UserError("--key-variable: expected the name of an environment variable, not a key")
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError(f"the key in ${variable} holds characters that no key has")
    return key


def _what_broke(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _server_message(payload: bytes) -> str:
    """What the server says, after a colon, where its error is JSON in one of the usual forms."""
    try:
        found = orjson.loads(payload)
    except ValueError:
        return ""
    for _ in range(4):  # {"error": {"message": …}}, FastAPI's {"detail": [{"msg": …}, …]}, …
        if isinstance(found, list):
            found = found[0] if found else None
        elif isinstance(found, dict):
            names = ("error", "message", "msg", "detail")
            found = next((found[name] for name in names if found.get(name)), None)
    return f": {found}" if isinstance(found, str) and found else ""


def _retry_after(text: str) -> float:
    """Seconds, from a number or a date; 0 where it is neither."""
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text.strip()):
        return float(text)
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0
