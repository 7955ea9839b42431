"""One server's connections: single exchanges of JSON, bounded in size and time, from any thread.

The server is not trusted: redirects are refused, replies and errors are read up to a limit, and
what it says reaches a message as one short line that cannot hold the key. When to ask again, and
how many at a time, is `robustft.engines.http`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
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

import robustft
from robustft.errors import UserError

_T = TypeVar("_T")
LARGEST_REPLY = 32 * 2**20  # bytes
TOO_MANY = 429
_LARGEST_ERROR = 64 * 2**10  # bytes of an error's body that are read
_PASSING = {408, 409, 425, TOO_MANY, *range(500, 600)}
_AWAY = {502, 503, 504}  # a proxy that finds no server behind it
_PER_CLIENT = 32  # connections of one httpx2 client, which looks at all of them at every request


class RequestError(Exception):
    """One try that failed. `status` is that of the HTTP reply, 0 without one."""

    def __init__(
        self, reason: str, *, status: int = 0, passing: bool = True, retry_after: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.passing = passing  # worth another try
        self.retry_after = retry_after  # seconds


class ServerAway(RequestError):
    """No connection, or a broken one, or a proxy that finds no server behind it."""


class NoAnswer(RequestError):
    """A sound reply that holds no answer, and would hold none if asked for again."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, status=200, passing=False)


class Connection:
    """Requests to one server, on an event loop and a thread of its own.

    One that is dropped takes its connections and its thread with it.

    Args:
        base_url: http(s) address, with its path ("http://localhost:8000/v1").
        key_variable: the environment variable that holds the key, sent as a bearer token where it
            is set. The key is never logged, raised or kept anywhere but in memory.
        most: requests in flight at most; the caller sees to it.
        timeout: seconds for one exchange, from connecting to the last byte.
        largest: bytes of a reply at most, after decompression.

    Raises:
        UserError: the address or the key is malformed, or the proxy or the certificates that the
            environment names cannot be used.
    """

    def __init__(
        self, base_url: str, *, key_variable: str, most: int, timeout: float, largest: int
    ) -> None:
        self.base_url = checked_address(base_url)
        self.met = False  # whether anything has ever answered there
        self._key = _key(key_variable)
        self._most = most
        self._timeout = timeout
        self._largest = largest
        self._in_flight: set[Future[Any]] = set()
        self._noting = threading.Lock()  # what is asked is in the set before anyone can cancel
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=_turn, args=(self._loop,), name="robustft-http", daemon=True
        )
        self._thread.start()
        try:
            clients = self.run(self._open())
        except (ValueError, ImportError, OSError) as error:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise UserError(
                f"the proxy or the certificates that the environment names cannot be used: {error}"
            ) from None
        self._end = weakref.finalize(self, _end, self._loop, clients)
        self._end.atexit = False

    async def _open(self) -> list[httpx2.AsyncClient]:
        headers = {
            "accept": "application/json",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": f"robustft/{robustft.__version__}",
        }
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        limits = httpx2.Limits(max_connections=_PER_CLIENT, max_keepalive_connections=_PER_CLIENT)
        certificates = httpx2.create_ssl_context()  # which takes a while: once
        clients = [
            httpx2.AsyncClient(
                headers=headers, limits=limits, timeout=self._timeout, follow_redirects=False,
                verify=certificates,
            )
            for _ in range(0, self._most, _PER_CLIENT)
        ]  # fmt: skip
        # A client for each request in flight, the last ones given back first: a few requests at a
        # time share the connections of one.
        self._free = [client for client in clients for _ in range(_PER_CLIENT)]
        return clients

    def close(self) -> None:
        """Close the connections and end the thread."""
        self._end()
        self._thread.join()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """`work`, done on the connection's own loop: the caller may be running one itself."""
        with self._noting:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._in_flight.add(future)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            with self._noting:
                self._in_flight.discard(future)

    def cancel(self) -> None:
        """Give up what other threads are waiting for: they get a CancelledError."""
        with self._noting:
            asked = list(self._in_flight)
        for future in asked:
            future.cancel()

    async def exchange(self, path: str, body: Any, read: Callable[[bytes], _T]) -> _T:
        """What `read` makes of the reply to one request, `body` None for a GET.

        Raises RequestError where there is none, or `read` cannot use it.
        """
        try:
            async with asyncio.timeout(self._timeout):
                payload = await self._reply(path, body)
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

    async def _reply(self, path: str, body: Any) -> bytes:
        url = self.base_url + path
        content = None if body is None else orjson.dumps(body)
        method = "GET" if body is None else "POST"
        async with (
            self._connected() as http,
            http.stream(method, url, content=content) as reply,
        ):
            self.met = True
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
    # All of them, whatever becomes of one.
    await asyncio.gather(*(client.aclose() for client in clients), return_exceptions=True)


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
