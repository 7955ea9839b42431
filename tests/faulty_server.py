"""A small OpenAI-compatible server with a deterministic model, and every fault we could think of.

The model is a hash: the next token's log-probabilities depend on the tokens so far. So the right
answer to every request is known, and generated, given and scored tokens agree as a real model's do.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import numpy as np

LETTERS = ("A", "B", "C", "Yes", "No", "1", "2", "perhaps", "so", ".")
END = 2  # the end-of-text token of the tests' tiny model


class HashModel:
    """Log-probabilities of the next of `size` tokens: a hash of those so far picks a random row."""

    def __init__(self, size: int) -> None:
        logits = np.random.default_rng(0).normal(size=(1021, size)) * 3
        self.table = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        self.order = np.argsort(-self.table, axis=1)  # tokens, the likeliest first
        self.rank = np.argsort(self.order, axis=1)

    def digests(self, ids: list[int]) -> list[int]:
        """[ids + 1] hashes: before the first token, after it, after the second …"""
        tokens = (token.to_bytes(4, "big") for token in ids)
        return list(itertools.accumulate(tokens, lambda d, t: zlib.crc32(t, d), initial=0))

    def rows(self, ids: list[int]) -> list[int]:
        """[ids + 1] rows of the table, by those hashes."""
        return [digest % len(self.table) for digest in self.digests(ids)]

    def logprobs(self, ids: list[int]) -> np.ndarray:
        return np.asarray(self.table[self.rows(ids)[-1]])

    def likeliest(self, row: int, top: int, *own: int) -> dict[int, float]:
        """The `top` likeliest tokens of a row and those named, the likeliest first."""
        tokens = dict.fromkeys([*self.order[row, :top].tolist(), *own])
        return {token: float(self.table[row, token]) for token in tokens}


def completion(model: HashModel, body: dict[str, Any]) -> dict[str, Any]:
    """An honest reply of /completions to a prompt of token ids, or of text by its bytes, greedy."""
    given = body["prompt"]
    prompt = list(given.encode() if isinstance(given, str) else given)
    top = int(body.get("logprobs") or 0)
    *before, last = model.digests(prompt)
    before = [digest % len(model.table) for digest in before]  # row of each given token
    named: list[tuple[int, int]] = []  # token, its row
    for _ in range(int(body["max_tokens"])):
        row = last % len(model.table)
        token = int(model.order[row, 0])
        named.append((token, row))
        if token == END:
            break
        last = zlib.crc32(token.to_bytes(4, "big"), last)
    tokens = [token for token, _ in named]
    choice: dict[str, Any] = {
        "index": 0,
        "text": "".join(f"<{token}>" for token in tokens if token != END),
        "finish_reason": "stop" if END in tokens else "length",
    }
    if "return_token_ids" in body:
        choice["token_ids"] = tokens
    if body.get("logprobs") is not None:
        echoed = list(zip(prompt, before, strict=True)) if body.get("echo") else []
        told = [*echoed, *named]
        values: list[float | None] = [float(model.table[row, token]) for token, row in told]
        tops: list[dict[str, float] | None] = [
            {f"token_id:{one}": value for one, value in model.likeliest(row, top, token).items()}
            for token, row in told
        ]
        if echoed:
            values[0] = tops[0] = None
        choice["logprobs"] = {
            "tokens": [f"token_id:{token}" for token, _ in told],
            "token_logprobs": values,
            "top_logprobs": tops,
        }
    if body.get("prompt_logprobs") is not None:
        best = int(body["prompt_logprobs"])
        choice["prompt_logprobs"] = [None] + [
            {
                str(one): {"logprob": value, "rank": int(model.rank[row, one]) + 1}
                for one, value in model.likeliest(row, best, token).items()
            }
            for token, row in zip(prompt[1:], before[1:], strict=True)
        ]
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
    return {"object": "text_completion", "choices": [choice], "usage": usage}


WORDS = HashModel(len(LETTERS))


def chat(body: dict[str, Any]) -> dict[str, Any]:
    """An honest reply of /chat/completions: a few words; sampled ones are the second likeliest."""
    asked = list(json.dumps(body["messages"]).encode())
    said: list[int] = []
    tokens = []
    for _ in range(min(int(body.get("max_tokens") or body["max_completion_tokens"]), 3)):
        row = WORDS.rows([*asked, *said])[-1]
        said.append(int(WORDS.order[row, 1 if body.get("temperature") else 0]))
        top = [
            {"token": f" {LETTERS[one]}", "logprob": value}
            for one, value in WORDS.likeliest(row, int(body.get("top_logprobs") or 0)).items()
        ]
        own = float(WORDS.table[row, said[-1]])
        tokens.append({"token": f" {LETTERS[said[-1]]}", "logprob": own, "top_logprobs": top})
    text = "".join(token["token"] for token in tokens)
    choice: dict[str, Any] = {
        "message": {"role": "assistant", "content": text}, "finish_reason": "length",
    }  # fmt: skip
    if body.get("logprobs"):
        choice["logprobs"] = {"content": tokens}
    usage = {"prompt_tokens": len(asked), "completion_tokens": len(said)}
    return {"object": "chat.completion", "choices": [choice], "usage": usage}


# --- faults ------------------------------------------------------------------------------------

Exchange = Callable[[socket.socket, dict[str, Any], str], None]
FAULTS: dict[str, Exchange] = {}  # the connection is closed after each


def fault(exchange: Exchange) -> Exchange:
    """Register an exchange (connection, honest reply, bearer token) under its name."""
    FAULTS[exchange.__name__] = exchange
    return exchange


def send(connection: socket.socket, payload: bytes, status: str = "200 OK", *headers: str) -> None:
    head = "\r\n".join(
        (f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(payload)}",
         *headers, "", "")
    )  # fmt: skip
    connection.sendall(head.encode("latin-1") + payload)


def send_json(connection: socket.socket, reply: Any, status: str = "200 OK", *headers: str) -> None:
    send(connection, json.dumps(reply).encode(), status, *headers)


@fault
def connection_reset(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@fault
def connection_closed(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    pass  # as it is after every fault


@fault
def no_reply_in_time(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    time.sleep(3.0)


@fault
def one_byte_at_a_time(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    for _ in range(30):
        connection.sendall(b" ")
        time.sleep(0.1)


@fault
def headers_for_ever(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for i in range(40):
        connection.sendall(f"x-{i}: {'y' * 10_000}\r\n".encode())


@fault
def not_http(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    connection.sendall(b"\x15\x03\x01\x00\x02\x02\x50 SSH-2.0-OpenSSH\r\n\r\n")


@fault
def truncated_json(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    whole = json.dumps(reply).encode()
    send(connection, whole[: len(whole) // 2])


@fault
def body_cut_off(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    whole = json.dumps(reply).encode()
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(whole) + whole[:-9])


@fault
def bad_chunks(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n{}\r\n")


@fault
def web_page(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send(connection, b"<html><title>Sign in to the hotel network</title></html>")


@fault
def empty_body(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send(connection, b"")


@fault
def bad_utf8(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send(connection, json.dumps(reply).encode().replace(b'"stop"', b'"\xff\xfe"')[:-1] + b"\xff}")


@fault
def deep_nesting(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send(connection, b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@fault
def wrong_schema(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send_json(connection, {"choices": {"text": "A"}})


@fault
def text_is_a_number(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    reply["choices"][0] |= {"text": 1, "message": {"content": 1}}
    send_json(connection, reply)


@fault
def empty_choices(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send_json(connection, reply | {"choices": []})


@fault
def error_with_status_200(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send_json(connection, {"error": {"message": f"overloaded, {key}"}})


@fault
def reply_was_filtered(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    reply["choices"][0] |= {"finish_reason": "content_filter", "text": ""}
    send_json(connection, reply)


@fault
def too_many_requests(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send_json(connection, {"error": "slow down"}, "429 Too Many Requests", "retry-after: 0.01")


@fault
def retry_after_a_date(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    date = formatdate(time.time() + 86_400, usegmt=True)
    send_json(connection, {"error": "later"}, "429 Too Many Requests", f"retry-after: {date}")


@fault
def retry_after_a_century(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send_json(connection, {}, "503 Service Unavailable", "retry-after: 3155760000")


@fault
def internal_error(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send_json(connection, {"detail": f"Traceback: headers={{'Bearer {key}'}}"}, "500 Internal")


@fault
def bad_gateway(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send(connection, b"<html>" + b"bad gateway " * 50_000, "502 Bad Gateway")


@fault
def bad_request(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    message = f"context length exceeded (authorization: Bearer {key})\x1b[31m\nrobustft: done"
    send_json(connection, {"error": {"message": message}}, "400 Bad Request")


@fault
def key_revoked(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send_json(connection, {"error": {"message": f"Incorrect API key: {key}"}}, "401 Unauthorized")


@fault
def redirect_elsewhere(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    address = f"location: http://127.0.0.1:9/steal?key={key}"
    send(connection, b"", "307 Temporary Redirect", address)


@fault
def huge_body(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 9000000000\r\n\r\n")
    for _ in range(64):
        connection.sendall(b" " * 2**20)


BOMB = gzip.compress(b" " * 2**26, 1)


@fault
def gzip_bomb(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send(connection, BOMB, "200 OK", "content-encoding: gzip")


@fault
def undecodable_encoding(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    send(connection, b"not gzip at all", "200 OK", "content-encoding: gzip")


@fault
def missing_logprobs(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    reply["choices"][0] |= {"logprobs": None, "prompt_logprobs": None}
    send_json(connection, reply)


@fault
def shifted_logprobs(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    alter(reply, order=lambda values: [values[-1], *values[:-1]])
    send_json(connection, reply)


@fault
def positive_logprobs(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    alter(reply, number=lambda value: -value)
    send_json(connection, reply)


@fault
def nan_logprobs(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    alter(reply, number=lambda value: float("nan"))
    send_json(connection, reply)


@fault
def too_few_logprobs(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    alter(reply, order=lambda values: values[:-1])
    send_json(connection, reply)


@fault
def token_id_below_zero(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    reply["choices"][0]["token_ids"] = [-1]
    send_json(connection, reply)


@fault
def token_id_beyond_all(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    reply["choices"][0]["token_ids"] = [2**31]
    send_json(connection, reply)


@fault
def prompt_cut_in_silence(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    reply["usage"]["prompt_tokens"] -= 7
    send_json(connection, reply)


@fault
def prompt_tokens_beyond_all(connection: socket.socket, reply: dict[str, Any], key: str) -> None:
    reply["usage"]["prompt_tokens"] = 10**30  # more than the store's integers hold
    send_json(connection, reply)


def alter(
    reply: dict[str, Any],
    *,
    number: Callable[[float], float] = lambda value: value,
    order: Callable[[list[Any]], list[Any]] = lambda values: values,
) -> None:
    """Change every log-probability, or their order; given text's move with their tokens' names."""
    choice = reply["choices"][0]
    given = choice.get("logprobs") or {}
    if "content" in given:  # of a chat
        values = order([number(token["logprob"]) for token in given["content"]])
        given["content"] = [
            token | {"logprob": value}
            for token, value in zip(given["content"], values, strict=False)
        ]
    elif given:
        values = [None if value is None else number(value) for value in given["token_logprobs"]]
        given["token_logprobs"] = order(values)
    if choice.get("prompt_logprobs"):
        choice["prompt_logprobs"] = [
            place
            and {
                token: entry | {"logprob": number(entry["logprob"])}
                for token, entry in place.items()
            }
            for place in order(choice["prompt_logprobs"])
        ]


class FaultyServer:
    """Serves on a free port of this machine; `fault` strikes as `strikes(body, try)` says."""

    def __init__(self, vocabulary: int, model_id: str = "hash-model") -> None:
        self.model = HashModel(vocabulary)
        self.model_id = model_id
        self.fault: str | None = None
        self.strikes: Callable[[int, int], bool] = lambda digest, tries: False
        self.unavailable: Callable[[dict[str, Any]], bool] = lambda body: False  # `fault`, always
        self.struck = 0
        self.longest = 1 << 30  # bytes of a request; `fault` strikes longer ones, too
        self.models: Callable[[], Any] = lambda: {
            "data": [{"id": self.model_id, "max_model_len": 2048}]
        }
        self.models_status = "200 OK"
        self.completions = True  # False: the server has only /chat/completions
        self.edit: Callable[[dict[str, Any], dict[str, Any]], None] = lambda body, reply: None
        self.tries: Counter[int] = Counter()
        self.requests = 0
        self.open = 0  # connections
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self.open += 1
        try:
            with connection, connection.makefile("rb") as incoming:
                while self._exchange(connection, incoming):
                    pass
        except (OSError, ValueError):
            pass  # the client went away, which the faults invite
        finally:
            with self._lock:
                self.open -= 1

    def _exchange(self, connection: socket.socket, incoming: Any) -> bool:
        words = incoming.readline().split()
        if len(words) != 3:
            return False
        headers = {}
        while line := incoming.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        sent = incoming.read(int(headers.get("content-length", 0)))
        path = words[1].decode()
        if path.endswith("/models"):
            send_json(connection, self.models(), self.models_status)
            return True
        if path.endswith("/v1/completions") and not self.completions:
            send_json(connection, {"error": "no such endpoint"}, "404 Not Found")
            return True
        with self._lock:
            self.requests += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self._answer(connection, path, sent, headers.get("authorization", "").split())
        finally:
            with self._lock:
                self.at_once -= 1

    def _answer(self, connection: socket.socket, path: str, sent: bytes, bearer: list[str]) -> None:
        body = json.loads(sent)
        digest = int.from_bytes(hashlib.blake2b(sent, digest_size=6).digest(), "big")
        with self._lock:
            tries = self.tries[digest]
            self.tries[digest] += 1
        reply = chat(body) if "messages" in body else completion(self.model, body)
        self.edit(body, reply)
        struck = self.strikes(digest, tries) or len(sent) > self.longest or self.unavailable(body)
        if self.fault is not None and struck:
            with self._lock:
                self.struck += 1
            FAULTS[self.fault](connection, reply, "".join(bearer[-1:]))
            return False
        send_json(connection, reply)
        return True
