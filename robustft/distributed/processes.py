"""Several shards at once on one machine: one process each, on GPUs of their own if so wished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from robustft.errors import UnfinishedError, UserError
from robustft.terminal import counted

_TRIES = 4  # starts of a shard that is killed again and again
_PATIENCE = 30.0  # seconds for an interrupted process to end by itself
_WRONG, _UNFINISHED = 2, 4


@dataclass(slots=True)
class _Child:
    """The process of one shard; what it says on stderr is passed on."""

    name: str
    command: list[str]
    environment: dict[str, str]
    # Line -> the shard that said it first: all announce the same input.
    told: dict[str, str] = field(default_factory=dict)
    starts: int = 0
    last: str = ""  # line on stderr
    process: subprocess.Popen[str] = field(init=False)
    _reader: threading.Thread = field(init=False)

    def start(self) -> None:
        self.starts += 1
        self.process = subprocess.Popen(
            self.command, env=self.environment, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _pass_on(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.last = line.rstrip()
            if self.told.setdefault(line, self.name) == self.name:
                sys.stderr.write(line)
                sys.stderr.flush()

    def end(self) -> int | None:
        """The exit status once it has ended."""
        status = self.process.poll()
        if status is not None:
            self._reader.join(5)
        return status


def require_gpus(count: int) -> None:
    """Raise UserError where there are fewer GPUs than processes to be pinned to one."""
    import torch

    found = torch.cuda.device_count()
    if found < count:
        raise UserError(
            f"--gpus {count}: found {counted(found, 'GPU')}; use --processes for several "
            "processes that share what there is"
        )


def run_processes(
    arguments: Sequence[str], shard: tuple[int, int], count: int, *, pinned: bool
) -> None:
    """Run `robustft ARGUMENTS` as `count` shards of `shard`, and wait for them all.

    A process that is killed is started again. Where one fails, the others are ended and its last
    words are raised.

    Parameters
    ----------
    arguments: those of a `clean` command.
    shard: the number of this machine's share, of how many.
    pinned: whether process i sees the i-th GPU only.
    """
    number, of = shard
    end = arguments.index("--") if "--" in arguments else len(arguments)
    children = []
    told: dict[str, str] = {}
    for index in range(count):
        name = f"{number * count + index}/{of * count}"
        options = ["--shard", name, "--processes", "1", "--gpus", "1"]
        if of == 1:  # all shards are children of this process, which knows when one is lost
            options += ["--wait", "inf"]
        command = [sys.executable, "-m", "robustft", *arguments[:end], *options, *arguments[end:]]
        children.append(_Child(name, command, _environment(index, count, pinned=pinned), told))
    run_children(children)


def run_children(children: Sequence[_Child]) -> None:
    """Start all and wait for them; see `run_processes`."""
    for child in children:
        child.start()
    try:
        running = list(children)
        while running:
            time.sleep(0.1)
            running = [child for child in running if not _finished(child)]
    finally:
        _end(children)


def _finished(child: _Child) -> bool:
    """Whether a child is through; starts a killed one again and raises for one that failed."""
    status = child.end()
    if status is None or status == 0:
        return status == 0
    if status == 128 + signal.SIGTERM:  # a child says so itself
        status = -signal.SIGTERM
    if status < 0 and child.starts < _TRIES:
        name = signal.Signals(-status).name
        print(f"robustft: shard {child.name}: {name}; starting it again", file=sys.stderr)
        child.start()
        return False
    if status < 0:
        raise UserError(f"shard {child.name}: killed {_TRIES} times (by {-status}); out of memory?")
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    said = child.last.removeprefix("robustft: ").removeprefix(f"shard {child.name}: ")
    said = said or f"ended with status {status} and said nothing"
    kind = {_WRONG: UserError, _UNFINISHED: UnfinishedError}.get(status)
    if kind is None:
        raise RuntimeError(f"shard {child.name}: {said}")
    error = kind(f"shard {child.name}: {said}")
    error.told = bool(child.last)  # by the child, in the same words
    raise error


def _environment(index: int, count: int, *, pinned: bool) -> dict[str, str]:
    """The process's share of the machine: one GPU, or its part of the cores."""
    environment = dict(os.environ)
    if pinned:
        seen = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        given = [name for name in seen if name.strip()]
        if given and len(given) < count:
            raise UserError(f"--gpus {count}: CUDA_VISIBLE_DEVICES names {len(given)}")
        environment["CUDA_VISIBLE_DEVICES"] = given[index] if given else str(index)
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    return environment


def _end(children: Sequence[_Child]) -> None:
    """End what still runs, gently at first."""
    alive = [child.process for child in children if child.starts and child.process.poll() is None]
    for process in alive:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _PATIENCE
    for process in alive:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
