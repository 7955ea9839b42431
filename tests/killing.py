"""Commands killed at one of their file operations and run again; `test_killed.py` starts this.

One process imports everything and forks for every run: importing takes seconds, a run a tenth.
What is wrong afterwards is printed, a line each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import robustft.store

robustft.store.UNIT_ROWS = 8  # before others take it over

import scripted  # noqa: E402
from commandline import quiz, write  # noqa: E402

import robustft.cleaning  # noqa: E402
import robustft.corruption  # noqa: E402
import robustft.distributed  # noqa: E402
import robustft.evaluation  # noqa: E402
import robustft.methods  # noqa: E402
import robustft.pipeline  # noqa: E402
import robustft.scoring  # noqa: E402
from robustft.cli import main  # noqa: E402

OUT = Path("out")
IN_FLIGHT = 9  # questions of a batch that is not stored yet, and the checker's empty one
CLEAN = ["clean", "in.jsonl", "--out", "out"]
SHARD = [*CLEAN, "--detector", "paper", "--wait", "0", "--shard"]
JOBS: dict[str, list[list[str]]] = {
    "clean": [[*CLEAN, "--detector", "paper", "--dataset-info"]],
    "shards": [[*SHARD, "1/2"], [*SHARD, "0/2"], [*SHARD, "1/2"], ["merge", "out"]],
    "method": [[*CLEAN, "--method", "self-label"]],
    "score": [["score", "in.jsonl", "--out", "out/lines.jsonl"]],
    "eval": [["eval", "in.jsonl", "--out", "out/lines.jsonl"]],
    "corrupt": [["corrupt", "in.jsonl", "--rate", "0.4", "--out", "out/noisy.jsonl"]],
}
DONE = (0, 4)  # 4: another shard's turn
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


class Engine(scripted.ScriptedEngine):
    """Notes in a file what it is asked, before it answers."""

    def _ask(self, prompts: Sequence[Any]) -> None:
        with Path("asked").open("a") as file:
            file.writelines(f"{scripted.digest(prompt)}\n" for prompt in prompts)


def count_operations(fatal: int) -> list[int]:
    """Die at operation number `fatal` on a file of OUT, from 1; returns the counter."""
    count = [0]

    def step() -> None:
        count[0] += 1
        if count[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and arguments[2] & WRITING and not isinstance(arguments[0], int)
        if (opened or event in EVENTS) and "out" in Path(str(arguments[0])).parts:
            step()

    sync, connect = os.fsync, sqlite3.connect

    def syncing(handle: int) -> None:
        step()
        sync(handle)

    def connecting(*arguments: Any, **settings: Any) -> sqlite3.Connection:
        database = connect(*arguments, **settings)
        database.set_trace_callback(lambda statement: step())
        return database

    os.fsync, sqlite3.connect = syncing, connecting  # type: ignore[assignment]
    sys.addaudithook(watch)
    return count


def run(command: Sequence[str], fatal: int = 0) -> tuple[int, int]:
    """Exit status of a command (-9: killed), and how many operations it made."""
    process = os.fork()
    if not process:
        status = 1
        try:
            with Path("said").open("w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            count = count_operations(fatal)
            status = main(command)
            Path("count").write_text(str(count[0]))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return status, int(Path("count").read_text()) if status in DONE else 0


def job(commands: Sequence[Sequence[str]], fatal: int = 0) -> tuple[str, int]:
    """Run the commands, each until it is done; what went wrong, and how many operations."""
    shutil.rmtree(OUT, ignore_errors=True)
    Path("asked").write_text("")
    total = 0
    for command in commands:
        status, count = run(command, fatal - total if fatal > total else 0)
        if status == -signal.SIGKILL:
            total = fatal
            status, count = run(command)
        total += count
        if status not in DONE:
            return f"{command} ended with {status}: {Path('said').read_text()[-300:]}", total
    return "", total


def found() -> dict[str, Any]:
    """What stands in OUT, but for what tells times."""
    files: dict[str, Any] = {}
    for path in OUT.rglob("*"):
        told = path.suffix not in (".sqlite", ".html", ".npy") and path.name != "facts.json"
        files[str(path.relative_to(OUT))] = path.read_bytes() if path.is_file() and told else None
        if path.name == "manifest.json":
            manifest = json.loads(path.read_bytes())
            files[path.name] = manifest["counts"], manifest["config"]
    return {name: body for name, body in files.items() if not name.endswith(".lock")}


def asked() -> list[str]:
    return Path("asked").read_text().split()


def kill_at_every(job_name: str, most: int) -> None:
    """Kill the job at each of its operations, or at `most` of them that are spread evenly."""
    commands = JOBS[job_name]
    wrong, total = job(commands)
    assert not wrong, wrong
    whole, questions = found(), asked()
    for fatal in sorted({1 + total * number // most for number in range(min(most, total))}):
        wrong, _ = job(commands, fatal)
        now, again = found(), asked()
        if not wrong and now != whole:
            names = sorted(n for n in whole.keys() | now.keys() if whole.get(n, 0) != now.get(n, 0))
            wrong = f"differ: {names}"
        if not wrong and set(again) != set(questions):
            wrong = "other questions were asked"
        if not wrong and len(again) > len(questions) + IN_FLIGHT:
            wrong = f"{len(again) - len(questions)} questions were asked again"
        if wrong:
            print(f"{job_name}, killed at operation {fatal} of {total}: {wrong}", flush=True)


if __name__ == "__main__":
    for module in (robustft.cleaning, robustft.evaluation, robustft.methods, robustft.scoring):
        module.load_engine = lambda *_: Engine()  # type: ignore[attr-defined]
    for module in (robustft.cleaning, robustft.methods):
        module.Embedder = lambda _: scripted.LetterEmbedder()  # type: ignore[attr-defined]
    robustft.pipeline._SECONDS_BETWEEN_MARKS = 0.0
    write(Path("in.jsonl"), [*quiz(13), b"{broken", *quiz(7, seed=1)])
    for name in JOBS:
        kill_at_every(name, int(sys.argv[1]))
