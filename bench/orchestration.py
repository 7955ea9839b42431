"""What `clean` costs beside its models: read, ask a stub, store, select, write.

    python bench/orchestration.py [--records 20000 100000] [--out bench/results/orchestration.csv]
    python bench/orchestration.py --default-model --records 1000 --panel "no reasoning" [--out …]

The stub answers from a hash and the embedder from a table, so nearly all that is timed is robustft.
Each size runs in a process of its own, for its peak memory. `one expert` asks the base model alone
(`--without` everything else); `no reasoning` adds checker, context and reviewer; `full panel` all
of them, two rounds of reasoning included. Every run is checked: one verdict a record, in order, and
keep + relabel + drop = records. With `--default-model` the embedded models answer, and what is told
is the share of the wall time, models loaded, that was spent neither in them nor in fitting the
crowd's learners, which is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustft.benchmarks.measure import (
    Row,
    append_rows,
    cpu_name,
    require_rows_file,
    table,
    versions,
)
from robustft.cleaning import load, run_clean
from robustft.config import CleanConfig, experts_for
from robustft.engines import Abilities, Choice, Generation, Prompt
from robustft.provenance import commit

PANELS = {
    "one expert": ("rel", "checker", "cer", "reviewer"),
    "no reasoning": ("rel",),
    "full panel": (),
}
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "iris", "jade")


class Stub:
    """An engine that answers from a hash of the prompt."""

    name = model_id = "stub"
    revision = "1"
    abilities = Abilities()
    embedded = False
    truncated = 0
    at_a_time = 1

    def plan(self, prompts: Sequence[Prompt], max_new_tokens: int = 0) -> list[list[int]]:
        """Batches of 64."""
        rows = list(range(len(prompts)))
        return [rows[low : low + 64] for low in range(0, len(rows), 64)]

    def choose(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]
    ) -> list[Choice]:
        """The candidate that the hash picks."""
        found = []
        for prompt, texts in zip(prompts, candidates, strict=True):
            said = zlib.crc32(prompt.messages[-1].content.encode())
            logprobs = np.full(len(texts), -3.0, np.float32)
            logprobs[said % len(texts)] = -0.1 - said % 97 / 100
            found.append(Choice(logprobs, 1.0, 10))
        return found

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, seeds: Any = None
    ) -> list[Generation]:
        """Always the same words."""
        values = np.full(4, 0.5, np.float32)
        return [Generation("so be", values, values, (0, 1, 2, 3, 5), 10, True) for _ in prompts]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        """Not needed here."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Nobody waits."""


class Table:
    """An embedder that looks its vectors up."""

    model_id = "table"
    dimensions = 32

    def __init__(self) -> None:
        self.rows = np.random.default_rng(0).standard_normal((4096, 32)).astype(np.float32)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """A row of the table for each text."""
        return self.rows[[zlib.crc32(text.encode()) % 4096 for text in texts]]


def make_input(path: Path, records: int, words: int = 12) -> None:
    """Multiple choice about so many words each."""
    rng = random.Random(0)
    with path.open("w") as file:
        for number in range(records):
            question = f"Number {number}: {' '.join(rng.choices(WORDS, k=words))}?"
            row = {"id": f"r{number}", "question": question, "options": ["red", "green", "blue"]}
            file.write(json.dumps(row | {"answer": rng.choice("ABC")}) + "\n")


class Timed:
    """Another engine or embedder, and the time spent in it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.wall = self.cpu = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name not in ("plan", "choose", "generate", "encode"):
            return found

        def call(*given: Any, **named: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return found(*given, **named)
            finally:
                self.wall += time.perf_counter() - wall
                self.cpu += time.process_time() - cpu

        return call


def measure(records: int, panel: str, *, default_model: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "in.jsonl", Path(folder) / "out"
        make_input(path, records)
        config = CleanConfig(
            input=str(path), out=out, without=frozenset(PANELS[panel]),
            detector="crowd" if default_model else "paper", experts=experts_for(default_model),
        )  # fmt: skip
        models = [Timed(one) for one in (load(config) if default_model else (Stub(), Table()))]
        begin, cpu = time.perf_counter(), time.process_time()
        result = run_clean(config, engine=models[0], embedder=models[1])  # type: ignore[arg-type]
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        with (out / "verdicts.jsonl").open("rb") as file:
            for number, line in enumerate(file):
                assert line.startswith(b'{"id":"r%d",' % number), line
        assert number + 1 == records
        assert sum(result.counts[name] for name in ("keep", "relabel", "drop")) == records
        learners = result.seconds["split"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    own = seconds - learners - sum(one.wall for one in models)
    own_cpu = cpu - sum(one.cpu for one in models)
    return {
        "seconds": seconds, "peak": peak, "own": own, "learners": learners,
        "own_cpu": own_cpu / cpu,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, nargs="+", default=[20_000])
    parser.add_argument("--panel", nargs="+", default=list(PANELS), choices=list(PANELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--default-model", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        records, panel = options.records[0], options.panel[0]
        print(json.dumps(measure(records, panel, default_model=options.default_model)))
        return
    require_rows_file(options.out)
    environment = {"OMP_NUM_THREADS": "1"} if not options.default_model else {}
    rows = []
    for panel in options.panel:
        for records in options.records:
            command = [sys.executable, __file__, "--one", "--records", str(records)]
            command += ["--default-model"] if options.default_model else []
            runs = [
                json.loads(
                    subprocess.run(
                        [*command, "--panel", panel], check=True, capture_output=True, text=True,
                        env=os.environ | environment,
                    ).stdout
                )
                for _ in range(options.repeats)
            ]  # fmt: skip
            times = sorted(run["own" if options.default_model else "seconds"] for run in runs)
            p20, p50, p80 = (times[round(share * (len(times) - 1))] for share in (0.2, 0.5, 0.8))
            case = f"{records} records, {panel}, peak {max(run['peak'] for run in runs)} MB"
            rate, unit = records / p50, "records/s"
            if options.default_model:
                shares = sorted(run["own"] / run["seconds"] for run in runs)
                rate, unit = 100 * shares[len(shares) // 2], "% of the wall time"
                case += f", default model {runs[0]['seconds']:.0f} s"
                case += f", learners {runs[0]['learners']:.1f} s"
                print(f"CPU beside the models, learners included: {runs[0]['own_cpu']:.2%}")
            row = Row(
                "orchestration", case, "robustft", 1, p20 * 1e3, p50 * 1e3, p80 * 1e3,
                rate, unit, "every record has its verdict, in order", cpu_name(),
                versions(("robustft", "numpy", "orjson")), commit(),
            )  # fmt: skip
            rows.append(row)
            print(table([row]), flush=True)
    if options.out:
        append_rows(options.out, rows)


if __name__ == "__main__":
    main()
