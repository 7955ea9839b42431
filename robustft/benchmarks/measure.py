"""What all benchmarks share: timing, one row per result, CSV."""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall-clock milliseconds of a call over its repetitions."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True, slots=True)
class Row:
    """One result: a contender on a case. `correct` is the gate that ran beside the timing."""

    benchmark: str
    case: str
    contender: str
    threads: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    rate: float
    unit: str
    correct: str
    device: str
    versions: str
    commit: str


def timed(call: Callable[[], object], *, repeats: int, budget: float = 5.0) -> Timing:
    """Time `call` after one warm-up, `repeats` times or until `budget` seconds are spent."""
    call()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() < end):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    times.sort()

    def at(share: float) -> float:
        return times[round(share * (len(times) - 1))]

    return Timing(at(0.2), at(0.5), at(0.8))


def cpu_name() -> str:
    """The processor's model name and its number of logical cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.processor() or platform.machine()


def versions(packages: Sequence[str]) -> str:
    """`name version` of each installed package, Python's first."""
    found = [f"python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def commit() -> str:
    """Short hash of the source tree, with + for uncommitted changes; "release" outside a clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "release"
    return head + ("+" if changed else "")


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append to a CSV file, with a header where the file is new."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def table(rows: Sequence[Row]) -> str:
    """Rows for a person, aligned."""
    head = ("case", "contender", "threads", "ms (p50)", "rate", "unit", "correct")
    body = [
        (
            r.case,
            r.contender,
            str(r.threads),
            f"{r.ms_p50:.3f}",
            f"{r.rate:,.4g}",
            r.unit,
            r.correct,
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) for x in [head, *body]]
    return "\n".join(line.rstrip() for line in lines)
