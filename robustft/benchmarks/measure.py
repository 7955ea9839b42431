"""What all benchmarks share: timing, one row per result, CSV."""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from robustft.errors import UserError
from robustft.files import make_folder
from robustft.provenance import commit

Case = TypeVar("Case")


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
    extra_mib: float | None = None  # most memory held beyond the inputs, where it was measured


def timed(call: Callable[[], object], *, repeats: int, budget: float = 5.0) -> Timing:
    """Time `call` after one warm-up, `repeats` times or until `budget` seconds are spent."""
    call()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() < end):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return _quantiles(times)


def _quantiles(times: list[float]) -> Timing:
    times.sort()
    p20, p50, p80 = (times[round(share * (len(times) - 1))] for share in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80)


def timed_together(
    calls: Mapping[str, Callable[[], object]], *, device: str, repeats: int, budget: float
) -> dict[str, Timing]:
    """Time several calls in turn, round after round, so that a change of weather meets them all.

    On a GPU each time is that of some calls in a row between two events, divided by their number:
    enough for 10 ms, so that the first launch, for which the GPU waits, does not count for much.
    On a CPU a pause lets the threads of the call before, which spin for a while, fall asleep.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    in_a_row = {}
    for name, call in calls.items():
        call()
        if device == "cuda":
            in_a_row[name] = min(50, max(5, int(10 / _milliseconds_on_gpu(call, 2))))
    end = time.perf_counter() + budget
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if device == "cuda":
                times[name].append(_milliseconds_on_gpu(call, in_a_row[name]))
            else:
                time.sleep(0.03)
                times[name].append(_wall(call))
    return {name: _quantiles(found) for name, found in times.items()}


def _wall(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _milliseconds_on_gpu(call: Callable[[], object], calls: int) -> float:
    import torch

    event: Any = torch.cuda.Event  # has no types
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls


def extra_mib(call: Callable[[], object], device: str) -> float | None:
    """Most memory in MiB that a call holds beyond what was held before; None where unknown."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # glibc keeps what the call before gave back; what is taken from there would not count.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        before = _resident("VmRSS")
        call()
        return max(0.0, _resident("VmHWM") - before) / 2**10
    except (OSError, KeyError):
        return None


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int({line.split(":")[0]: line for line in lines}[field].split()[1])


def device_name(device: str) -> str:
    """The processor's or the GPU's name."""
    if device != "cuda":
        return cpu_name()
    import torch

    return str(torch.cuda.get_device_name())


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


def rows_of(
    benchmark: str,
    case: object,
    calls: Mapping[str, Callable[[], object]],
    timings: Mapping[str, Timing],
    *,
    rate: Callable[[float], float],
    unit: str,
    correct: Mapping[str, str],
    device: str,
    packages: Sequence[str],
) -> list[Row]:
    """Rows of torch calls that were timed together; measures the memory of each.

    `rate` turns milliseconds a call into `unit`, `correct` maps contenders to their gates (those
    without one get "-"), `packages` are those whose versions are noted.
    """
    import torch

    threads = 0 if device == "cuda" else torch.get_num_threads()
    common = (device_name(device), versions(packages), commit())
    rows = []
    for name, timing in timings.items():
        times = (timing.p20, timing.p50, timing.p80)
        judged = (rate(timing.p50), unit, correct.get(name, "-"))
        memory = extra_mib(calls[name], device)
        rows.append(Row(benchmark, str(case), name, threads, *times, *judged, *common, memory))
    return rows


def compare(
    description: str | None,
    arguments: Sequence[str] | None,
    *,
    cases: Callable[[str, bool], Sequence[Case]],
    measure: Callable[[Case, str, bool], tuple[list[Row], dict[str, str]]],
    ours: str,
) -> int:
    """A benchmark's command: every case's verdict and CSV rows as soon as it is done, then a table.

    `cases` says what to measure, given the device ("cpu" or "cuda") and whether to be quick;
    `measure` returns a case's rows, and for each peer that was not run the reason. The contender
    `ours` is compared with the others, of which one is named "limit: ...".

    Returns 1 when a gate failed.
    """
    import torch

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, under a minute")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, help="append CSV rows to this file")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    options = parser.parse_args(arguments)
    require_rows_file(options.out)
    chosen = [c for c in cases(options.device, options.quick) if options.only in str(c)]
    if not chosen:
        names = "; ".join(map(str, cases(options.device, options.quick)))
        raise UserError(f"--only: expected text from one of {names}, found {options.only!r}")
    rows: list[Row] = []
    refused: dict[str, str] = {}
    for case in chosen:
        print(case, file=sys.stderr, flush=True)
        with torch.inference_mode():
            made, unable = measure(case, options.device, options.quick)
        print(verdict(made, ours), flush=True)
        if options.out:
            append_rows(options.out, made)
        rows += made
        refused |= unable
    print(table(rows))
    for name, reason in refused.items():
        print(f"not run: {name}: {reason}")
    return int(any(row.correct == "NO" for row in rows))


def verdict(rows: Sequence[Row], ours: str) -> str:
    """One line on a case: our share of the limit and how many times faster than each peer."""
    own = next(row for row in rows if row.contender == ours)
    limit = next(row for row in rows if row.contender.startswith("limit"))
    share = limit.ms_p50 / own.ms_p50
    peers = [row for row in rows if row is not own and row is not limit]
    ratios = ", ".join(f"{row.ms_p50 / own.ms_p50:.2f}x {row.contender}" for row in peers)
    what = limit.contender.removeprefix("limit: ")
    return f"{own.case}: {share:.0%} of {what}; speed {ratios}; correct: {own.correct}"


def require_rows_file(path: Path | None) -> None:
    """Raise UserError where `append_rows` could not write to `path`; makes its folder.

    To be called before anything is measured.
    """
    if path is not None:
        _columns(path)


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append to a CSV file, which keeps the columns it began with; a new one gets a header."""
    found = _columns(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, found or _NAMES, extrasaction="ignore")
        if not found:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


_NAMES = [field.name for field in fields(Row)]


def _columns(path: Path) -> list[str]:
    """The columns of a CSV file of rows; none of a new one, which is made with its folder."""
    try:
        make_folder(path.parent)
        with path.open("a+", newline="", encoding="utf-8", errors="replace") as file:
            file.seek(0)
            found = next(csv.reader(file), [])
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    if not set(found) <= set(_NAMES):
        raise UserError(f"{path}: expected columns among {', '.join(_NAMES)}, found {found}")
    return found


def table(rows: Sequence[Row]) -> str:
    """Rows for a person, aligned."""
    head = ("case", "contender", "threads", "ms (p50)", "rate", "unit", "correct", "extra MiB")
    body = [
        (
            r.case,
            r.contender,
            str(r.threads),
            "-" if math.isnan(r.ms_p50) else f"{r.ms_p50:.3f}",
            f"{r.rate:,.4g}",
            r.unit,
            r.correct,
            "-" if r.extra_mib is None else f"{r.extra_mib:,.0f}",
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) for x in [head, *body]]
    if _shared_out(rows):
        lines.append("Some contenders were timed on a part of the work: compare rates, not ms.")
    return "\n".join(line.rstrip() for line in lines)


def _shared_out(rows: Sequence[Row]) -> bool:
    """Whether contenders of a case did different amounts of work in their time."""
    done: dict[tuple[str, str], set[float]] = {}
    for row in rows:
        counted = row.unit.endswith(("pairs/s", "queries/s"))  # bytes also differ by what is copied
        if counted and math.isfinite(row.ms_p50 * row.rate):
            done.setdefault((row.case, row.unit), set()).add(row.ms_p50 * row.rate)
    return any(max(amounts) > 1.2 * min(amounts) for amounts in done.values())
