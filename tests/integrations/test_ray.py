"""`clean --ray`: the bytes of one process, whoever is killed. Real Ray, a cluster of its own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from commandline import quiz, read, write

pytest.importorskip("ray")

pytestmark = pytest.mark.integration
HERE = Path(__file__).resolve().parent.parent
RESULTS = ("verdicts.jsonl", "cleaned.jsonl", "rejects.jsonl")
# Tiny random models, or scripted ones; two actors; the same settings with and without Ray.
DRIVER = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from functools import partial
from pathlib import Path
import ray
from robustft.cleaning import load, run_clean
from robustft.config import CleanConfig, EngineConfig
from robustft.distributed.raycluster import run_ray
from scripted import LetterEmbedder, ScriptedEngine, slowly

how, source, out, model, encoder = sys.argv[1:]

def scripted(config):
    sys.path.insert(0, {str(HERE)!r})
    from scripted import LetterEmbedder, ScriptedEngine, slowly
    return ScriptedEngine(before_batch=slowly(0.01 if how == "ray" else 0)), LetterEmbedder()

tiny = model != "-"
config = CleanConfig(
    input=source, out=Path(out), detector="paper", threads=1,
    without=frozenset(("rel", "reviewer")) if tiny else frozenset(("rel",)),
    engine=EngineConfig(model=model if tiny else None), embedder=encoder if tiny else None,
)
loader = load if tiny else scripted
if how == "one":
    engine, embedder = loader(config)
    run_clean(config, engine=engine, embedder=embedder)
else:
    run_ray(config, None, 2, loader)
"""


def driver(how: str, *arguments: object) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_DISABLE_MEMORY_MONITOR": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, how, *map(str, arguments)], env=environment
    )


def workers(out: Path) -> list[int]:
    """Processes that hold a shard, or held one last."""
    found = set()
    for lock in out.glob("shards/rows-*/.lock"):
        number = int(lock.read_text() or 0)
        if number and Path(f"/proc/{number}").exists():
            found.add(number)
    return sorted(found)


def units(out: Path) -> int:
    return len([*out.glob("shards/rows-*/phases/*")])


@pytest.mark.parametrize(
    ("rows", "kills", "tiny"),
    [(1500, 2, False), pytest.param(20_000, 10, True, marks=pytest.mark.slow)],
)
def test_workers_and_drivers_are_killed_and_nothing_is_lost(
    tmp_path: Path, rows: int, kills: int, tiny: bool, tiny_model: Path, tiny_encoder: Path
) -> None:
    source = write(tmp_path / "in.jsonl", quiz(rows))
    models = (tiny_model, tiny_encoder) if tiny else ("-", "-")
    assert driver("one", source, tmp_path / "one", *models).wait() == 0
    out = tmp_path / "ray"
    moments = random.Random(kills)
    running = driver("ray", source, out, *models)
    killed: Counter[str] = Counter()
    for number in range(kills):
        begun, deadline = units(out), time.monotonic() + 600
        while units(out) < begun + 1 and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)  # something is finished between two kills
        time.sleep(moments.uniform(0, 2))
        if running.poll() is not None:
            break
        if number % 2 == 0 and (alive := workers(out)):
            os.kill(moments.choice(alive), signal.SIGKILL)
            killed["worker"] += 1
        else:
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
            killed["driver"] += 1
            running = driver("ray", source, out, *models)
    print(killed)
    assert running.wait() == 0
    assert sum(killed.values()) == kills
    for name in RESULTS:
        assert (out / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    ids = [line["id"] for line in read(out / "verdicts.jsonl")]
    assert ids == [f"r{i}" for i in range(rows)]
