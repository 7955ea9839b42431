"""How well `clean`, `eval` and `score` keep an OpenAI-compatible server busy.

    python bench/server.py [--records 1536] [--slots 128] [--scale 1]
        [--out bench/results/server.csv]

The server is simulated, in a process of its own: it works on `--slots` requests at a time, each for
60 to 2,560 ms times `--scale` (log-uniform, drawn from the request's hash), and answers from a
hash of the tokens so far, as honestly as a real model. What it can do is slots / mean latency. The
peer asks about one batch after the other. First 600 records are asked about one request at a time:
verdicts, predictions and scores must be those of many at a time, byte by byte. CPU is the
client's: reading, encoding, HTTP, checking and storing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from orchestration import Table, make_input

from robustft import models
from robustft.benchmarks.measure import (
    Row,
    append_rows,
    cpu_name,
    require_rows_file,
    table,
    versions,
)
from robustft.cleaning import run_clean
from robustft.config import CleanConfig, EngineConfig, EvalConfig
from robustft.engines import Engine
from robustft.engines.encoding import PromptEncoder
from robustft.engines.http import JsonClient
from robustft.engines.probing import connect
from robustft.evaluation import evaluate
from robustft.prompts import CHECKER_WORDS, LETTERS
from robustft.provenance import commit
from robustft.scoring import score_file

COMMANDS = ("clean", "eval", "score")
SHORTEST, LONGEST = 0.060, 2.560  # seconds
GATE = 600  # records: more than one unit
FLOOR = -15.0  # nats: any token but the likeliest few
WORDS = 40  # of a question

# --- the server -------------------------------------------------------------------------------


class Model:
    """Log-probabilities of the next token: a hash of those so far picks a row of a table."""

    def __init__(self, tokens: Sequence[int]) -> None:
        logits = np.random.default_rng(0).normal(size=(251, len(tokens))) * 2
        logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        self.rows = []
        for row in logits.tolist():
            order = sorted(range(len(tokens)), key=lambda i, row=row: -row[i])
            self.rows.append({tokens[i]: row[i] for i in order})  # the likeliest first

    def top(self, row: dict[int, float], count: int, own: int) -> dict[int, float]:
        """The likeliest, and a token of one's own."""
        found = dict(itertools.islice(row.items(), count))
        return found if own in found else found | {own: row.get(own, FLOOR)}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A reply of /completions to token ids, with what vLLM tells beside it."""
        prompt, written = body["prompt"], []
        hashes = list(itertools.accumulate(prompt, _further, initial=0))
        *given, last = [self.rows[one % len(self.rows)] for one in hashes]
        digest = hashes[-1]
        for _ in range(body["max_tokens"]):
            token = next(iter(last))
            written.append((token, last))
            digest = _further(digest, token)
            last = self.rows[digest % len(self.rows)]
        choice: dict[str, Any] = {
            "text": "", "finish_reason": "length", "token_ids": [token for token, _ in written],
        }  # fmt: skip
        if (count := body.get("logprobs")) is not None:
            tops = [self.top(row, count, token) for token, row in written]
            choice["logprobs"] = {
                "tokens": [f"token_id:{token}" for token, _ in written],
                "token_logprobs": [row[token] for token, row in written],
                "top_logprobs": [{f"token_id:{n}": v for n, v in top.items()} for top in tops],
            }
        if (count := body.get("prompt_logprobs")) is not None:
            choice["prompt_logprobs"] = [None] + [
                {
                    str(n): {"logprob": v, "rank": 1 + list(row).index(n) if n in row else 99}
                    for n, v in self.top(row, count, token).items()
                }
                for token, row in zip(prompt[1:], given[1:], strict=True)
            ]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(written)}
        return {"choices": [choice], "usage": usage}


def _further(digest: int, token: int) -> int:
    return zlib.crc32(token.to_bytes(4, "big"), digest)


class Simulation:
    """Slots, latencies, and how much of the slots was used."""

    def __init__(self, model: Model, slots: int, scale: float) -> None:
        self.model, self.scale = model, scale
        self.slots = asyncio.Semaphore(slots)
        # Seconds: of the latencies drawn, and of the slots.
        self.requests, self.latency, self.busy = 0, 0.0, 0.0

    async def reply(self, path: str, sent: bytes) -> Any:
        """What a request is answered, after its latency."""
        if path.endswith("/models"):
            return {"data": [{"id": "simulated", "max_model_len": 1 << 20}]}
        if path.endswith("/told"):
            return {"requests": self.requests, "latency": self.latency, "busy": self.busy}
        share = zlib.crc32(sent) / 2**32
        async with self.slots:
            begin = time.perf_counter()
            latency = SHORTEST * (LONGEST / SHORTEST) ** share * self.scale
            said = self.model.complete(orjson.loads(sent))
            await asyncio.sleep(begin + latency - time.perf_counter())
            self.requests, self.latency = self.requests + 1, self.latency + latency
            self.busy += time.perf_counter() - begin
        return said

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        over = (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError)
        with contextlib.suppress(*over):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = head.partition(b"content-length:")[2].split(b"\r\n")[0].strip()
                sent = await reader.readexactly(int(size or 0))
                body = orjson.dumps(await self.reply(head.split()[1].decode(), sent))
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d"
                    b"\r\n\r\n%b" % (len(body), body)
                )
                await writer.drain()
        writer.close()


async def serve(tokens: Sequence[int], slots: int, scale: float) -> None:
    """Serve on a free port, which is printed, until standard input ends."""
    simulation = Simulation(Model(tokens), slots, scale)
    server = await asyncio.start_server(simulation.serve, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


@contextlib.contextmanager
def served(tokens: Sequence[int], slots: int, scale: float) -> Iterator[str]:
    """The address of a simulated server that is there meanwhile."""
    given = json.dumps([list(tokens), slots, scale])
    command = [sys.executable, __file__, "--serve", given]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        process.stdin.close()


# --- the client -------------------------------------------------------------------------------


def engine(url: str, concurrency: int, *, alone: bool) -> Engine:
    """One that asks about one batch at a time, or as it would by itself."""
    model = models.find_model(None).path
    config = EngineConfig(engine="openai", base_url=url, tokenizer=str(model))
    made = connect(config, JsonClient(url, concurrency=concurrency))
    if alone:
        made.at_a_time = 1
    return made


def run(command: str, source: Path, folder: Path, made: Engine) -> tuple[bytes, float]:
    """What a command writes, and the seconds in which it asked."""
    begin = time.perf_counter()
    if command == "clean":  # nothing but detection asks
        without = frozenset({"rel", "cer", "reviewer"})
        config = CleanConfig(str(source), folder, detector="paper", without=without)
        seconds = run_clean(config, engine=made, embedder=Table()).seconds["detect"]
        return (folder / "verdicts.jsonl").read_bytes(), seconds
    out = folder / "lines.jsonl"
    if command == "eval":
        evaluate(EvalConfig(str(source), out=out), engine=made)
    else:
        score_file(str(source), out, EngineConfig(), engine=made)
    return out.read_bytes(), time.perf_counter() - begin


@dataclass(frozen=True)
class Measured:
    """A command's requests at a server."""

    seconds: float
    requests: int
    latency: float  # seconds, their mean
    in_flight: float  # their mean number
    cpu: float  # seconds of the client's


def measure(command: str, source: Path, url: str, slots: int, *, alone: bool) -> Measured:
    made = engine(url, slots, alone=alone)
    with tempfile.TemporaryDirectory() as folder:
        before, cpu = told(url), time.process_time()
        _, seconds = run(command, source, Path(folder), made)
        after, cpu = told(url), time.process_time() - cpu
    new = {name: after[name] - before[name] for name in after}
    mean, in_flight = new["latency"] / new["requests"], new["busy"] / seconds
    return Measured(seconds, int(new["requests"]), mean, in_flight, cpu)


def told(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/told") as reply:
        found: dict[str, float] = json.load(reply)
    return found


def alike(source: Path, url: str, slots: int) -> bool:
    """Whether many requests at a time write what one at a time does."""
    written = []
    for concurrency in (1, slots):
        made = engine(url, concurrency, alone=concurrency == 1)
        with tempfile.TemporaryDirectory() as folder:
            places = {command: Path(folder) / command for command in COMMANDS}
            for place in places.values():
                place.mkdir()
            written.append([run(name, source, place, made)[0] for name, place in places.items()])
    return written[0] == written[1]


def tokens() -> list[int]:
    """The tokens that the model ever finds likely: letters, yes and no among them."""
    encoder = PromptEncoder(models.load_tokenizer(models.find_model(None)))
    words = [*(f" {letter}" for letter in LETTERS[:3]), *CHECKER_WORDS]
    own = [encoder.continuation("Answer:", word)[0] for word in words]
    return list(dict.fromkeys([*own, *range(1000, 1020)]))[:20]


def main() -> int:
    """Run the benchmark; status 1 where what is written depends on how many are asked at a time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=1536)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", choices=COMMANDS, action="append")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(*json.loads(options.serve)))
        return 0
    require_rows_file(options.out)
    # Every run has a client of its own, which has yet to learn what the server takes, but need not
    # load the tokenizer.
    models.load_tokenizer = functools.cache(models.load_tokenizer)
    known = tokens()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source, few = Path(folder) / "in.jsonl", Path(folder) / "few.jsonl"
        make_input(source, options.records, WORDS)
        make_input(few, GATE, WORDS)
        with served(known, options.slots, 0.005) as url:
            correct = alike(few, url, options.slots)
        with served(known, options.slots, options.scale) as url:
            for command in options.only or COMMANDS:
                found = {
                    alone: measure(command, source, url, options.slots, alone=alone)
                    for alone in (True, False)
                }
                rows += rows_of(command, options, found, "yes" if correct else "NO")
                print(table(rows[-3:]), flush=True)
    if options.out:
        append_rows(options.out, rows)
    return int(not correct)


def rows_of(
    command: str, options: argparse.Namespace, found: dict[bool, Measured], correct: str
) -> list[Row]:
    case = f"{command}, {options.records} records, {options.slots} slots"
    common = cpu_name(), versions(("robustft", "httpx2", "orjson")), commit()
    rows = []
    for alone, contender in ((False, "robustft"), (True, "one batch at a time")):
        one = found[alone]
        more = f", in flight {one.in_flight:.0f}, CPU {1e3 * one.cpu / one.requests:.2f} ms"
        times = [1e3 * one.seconds] * 3
        rate = one.requests / one.seconds
        rows.append(
            Row("server", case, contender + more, 1, *times, rate, "requests/s", correct, *common)
        )
    best = options.slots / found[False].latency
    times = [1e3 * found[False].requests / best] * 3
    limit = f"limit: slots / mean latency of {1e3 * found[False].latency:.0f} ms"
    rows.append(Row("server", case, limit, 1, *times, best, "requests/s", "-", *common))
    shares = [f"{row.rate / best:.0%}" for row in rows[:2]]
    print(f"{case}: {shares[0]} of what the server can do; one batch at a time {shares[1]}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
