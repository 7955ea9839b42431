"""Requests to a server: how many at a time, how long, and what is told of them."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import itertools
import socket
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tenacity", reason="needs the server extra: pip install 'robustft[server]'")
from faulty_server import FAULTS, FaultyServer, send_json
from served import KEY, client, engine, questions

from robustft.config import EngineConfig
from robustft.engines import Choice, Failure, connection
from robustft.engines.factory import load_engine
from robustft.engines.http import JsonClient
from robustft.errors import EngineLost, UserError

# The server's own threads must not fail: a fault that never left it would pass for one withstood.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def test_requests_in_flight_are_bounded(server: FaultyServer, tiny_model: Path) -> None:
    made = engine(server, tiny_model)
    server.edit = lambda body, reply: time.sleep(0.05)
    made.choose(*questions(20))
    assert 1 < server.most_at_once <= 16


def test_a_server_gets_as_many_requests_as_it_takes(
    server: FaultyServer, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = engine(server, tiny_model, longest_wait=10.0)
    server.fault = "too_many_requests"
    server.strikes = lambda digest, tries: digest % 3 == 0 and tries < 9
    replies = made.choose(*questions(100))
    assert not [one for one in replies if isinstance(one, Failure)]
    assert [r.getMessage().split(": ", 1)[1] for r in caplog.records] == [
        "refuses some requests as too many at a time; it gets as many as it takes"
    ]


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_that_is_busy_at_first_is_not_taken_for_a_lesser_one(
    server: FaultyServer, tiny_model: Path, chat: bool
) -> None:
    calm = engine(server, None if chat else tiny_model).abilities
    requests = itertools.count(1)
    server.fault = "too_many_requests"
    server.strikes = lambda digest, tries: next(requests) % 4 != 0
    assert engine(server, None if chat else tiny_model, longest_wait=10.0).abilities == calm


def test_a_server_that_takes_no_request_is_not_asked_for_ever(
    server: FaultyServer, tiny_model: Path
) -> None:
    made = engine(server, tiny_model)
    server.fault, server.strikes = "too_many_requests", lambda digest, tries: True
    with pytest.raises(EngineLost, match=r": HTTP 429: slow down, and nothing else for 0\.1 s$"):
        engine(server, tiny_model)
    replies = made.choose(*questions(20))
    assert {str(one.reason) for one in replies if isinstance(one, Failure)} == {
        "HTTP 429: slow down (and nothing else for 0.1 s)"
    }
    assert len(replies) == 20


def test_how_many_texts_it_takes_is_not_learnt_from_letters(server: FaultyServer) -> None:
    """A server that works on few at a time answers letters at once all the same."""
    made = JsonClient(server.url, concurrency=64)
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "temperature": 0}
    letters, texts = ([body | {"max_tokens": most, "n": n} for n in range(100)] for most in (1, 9))
    go_on = threading.Event()

    def wait(asked: dict[str, Any], reply: dict[str, Any]) -> None:
        if asked["max_tokens"] > 1:
            go_on.wait(60)

    server.edit = wait
    assert made.ask_all("/chat/completions", letters, [len] * 100)
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(made.ask_all, "/chat/completions", texts, [len] * 100)
        patience = time.monotonic() + 60
        while server.at_once < 16:
            assert time.monotonic() < patience
            time.sleep(0.01)
        time.sleep(0.2)
        assert server.at_once == 16
        go_on.set()
        assert len(said.result(60)) == 100


@pytest.mark.parametrize("slow", [False, True])
def test_cancel_ends_what_another_thread_waits_for(
    server: FaultyServer, tiny_model: Path, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(server, tiny_model)
    go_on, asked = threading.Event(), threading.Event()
    submit = asyncio.run_coroutine_threadsafe

    def submit_and_sleep(work: Any, loop: asyncio.AbstractEventLoop) -> Any:
        future = submit(work, loop)
        time.sleep(0.3)  # the request is out before the thread that asks goes on
        return future

    if slow:
        monkeypatch.setattr(connection.asyncio, "run_coroutine_threadsafe", submit_and_sleep)

    def wait(body: dict[str, Any], reply: dict[str, Any]) -> None:
        asked.set()
        go_on.wait(60)

    server.edit = wait
    prompts, candidates = questions(3)
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(made.choose, prompts, candidates)
        assert asked.wait(60)
        made.cancel()
        with pytest.raises(CancelledError):
            said.result(60)
    go_on.set()
    assert made.choose(prompts, candidates)  # and goes on from there


@pytest.mark.parametrize("closed", [True, False])
def test_a_client_leaves_no_thread_and_no_connection(server: FaultyServer, closed: bool) -> None:
    made = client(server)
    made.ask("/models", None, bytes)
    thread = made._connection._thread
    assert server.open == 1
    if closed:
        made.close()
        made.close()
    del made
    patience = time.monotonic() + 10
    while (thread.is_alive() or server.open) and time.monotonic() < patience:
        gc.collect()  # again and again: the thread itself may hold the last request for a moment
        time.sleep(0.01)
    assert not thread.is_alive()
    assert server.open == 0


def test_a_client_dropped_by_a_slow_thread_leaves_no_thread(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = asyncio.run_coroutine_threadsafe

    def slow(work: Any, loop: asyncio.AbstractEventLoop) -> Any:
        future = submit(work, loop)
        future.result()  # the thread that drops the client gets its turn when all is closed
        time.sleep(0.05)  # and the loop waits for events again
        return future

    made = client(server)
    made.ask("/models", None, bytes)
    thread = made._connection._thread
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", slow)
    del made
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_connection_that_cannot_be_closed_leaves_no_other_open() -> None:
    closed = []

    class Client:
        async def aclose(self) -> None:
            if not closed:
                closed.append("")
                raise OSError("broken pipe")
            closed.append("closed")

    made: Any = [Client() for _ in range(3)]
    asyncio.run(connection._close(made))
    assert closed == ["", "closed", "closed"]


@pytest.mark.parametrize("error", [IndexError, KeyError, OverflowError, RecursionError, ValueError])
def test_a_reply_that_cannot_be_read_costs_one_request(
    server: FaultyServer, error: type[Exception]
) -> None:
    def read(payload: bytes) -> bytes:
        if b"Question 1?" in payload:
            raise error("out of range")
        return payload

    server.edit = lambda body, reply: reply.update(asked=body["messages"][0]["content"])
    bodies = [
        {"messages": [{"role": "user", "content": f"Question {i}?"}], "max_tokens": 1}
        for i in range(3)
    ]
    found = client(server, retries=0).ask_all("/chat/completions", bodies, [read] * 3)
    assert [isinstance(one, Failure) for one in found] == [False, True, False]


def test_a_client_asks_again_after_its_server_was_lost(server: FaultyServer) -> None:
    made = engine(server, None, retries=0)
    server.fault, server.strikes = "connection_reset", lambda digest, tries: True
    made.choose(*questions(70))
    with pytest.raises(EngineLost, match="the last 70 requests failed"):
        made.choose(*questions(1))
    server.fault = None
    assert isinstance(made.choose(*questions(1))[0], Choice)


def test_who_comes_later_does_not_inherit_a_lost_server(server: FaultyServer) -> None:
    made = engine(server, None, retries=0)
    server.fault, server.strikes = "connection_reset", lambda digest, tries: True
    assert all(isinstance(said, Failure) for said in made.choose(*questions(70)))  # a run's last
    server.fault = None
    before = server.requests
    assert all(isinstance(said, Choice) for said in made.choose(*questions(3)))
    assert server.requests == before + 3


@pytest.mark.parametrize(
    ("status", "reply"),
    [
        ("200 OK", {"error": {"message": "no such model"}}),
        ("200 OK", {"error": "no such model"}),
        ("200 OK", {"object": "error", "message": "no such model", "code": 404}),
        ("422 Unprocessable", {"detail": [{"loc": ["body", "n"], "msg": "no such model"}]}),
        ("422 Unprocessable", {"detail": {"error": "no such model"}}),
        ("400 Bad Request", {"error": {"message": ["no such model"]}}),
    ],
)
def test_what_a_server_says_of_an_error_is_told(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, status: str, reply: object
) -> None:
    def say(connection: socket.socket, honest: dict[str, Any], key: str) -> None:
        send_json(connection, reply, status)

    made = engine(server, None, retries=0)
    monkeypatch.setitem(FAULTS, "say", say)
    server.fault, server.strikes = "say", lambda digest, tries: True
    (failure,) = made.choose(*questions(1))
    assert isinstance(failure, Failure)
    assert ": no such model" in failure.reason


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("localhost:8000/v1", "expected an http or https address"),
        ("ftp://host/v1", "expected an http or https address"),
        ("http://user:hunter2@host/v1", "without user name, password"),
        ("http://host/v1?key=hunter2", "without user name, password"),
        ("http://[bad/v1", "expected an"),
    ],
)
def test_a_bad_address(address: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        load_engine(EngineConfig(engine="openai", base_url=address))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "ftp://user:hunter2@host"),
        ("ALL_PROXY", "socks5://user:hunter2@host"),
        ("SSL_CERT_FILE", "/nowhere/certificates.pem"),
    ],
)
def test_an_environment_that_cannot_be_used(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    if value.startswith("socks") and importlib.util.find_spec("socksio"):
        pytest.skip("socksio is installed")
    monkeypatch.setenv(variable, value)
    threads = threading.active_count()
    with pytest.raises(UserError, match="that the environment names cannot be used: ") as caught:
        client(server)
    assert "hunter2" not in str(caught.value)
    patience = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < patience:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_a_key_given_as_the_name_of_its_variable_is_not_repeated(server: FaultyServer) -> None:
    with pytest.raises(UserError, match="--key-variable") as caught:
        load_engine(EngineConfig(engine="openai", base_url=server.url, key_variable=KEY))
    assert KEY not in str(caught.value)


def test_a_key_with_a_line_break_is_not_repeated(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "hunter2\r\nx-injected: 1")
    with pytest.raises(UserError, match=r"\$MY_KEY") as caught:
        load_engine(EngineConfig(engine="openai", base_url=server.url, key_variable="MY_KEY"))
    assert "hunter2" not in str(caught.value)
