"""Exact cosine kNN beside its peers, in queries a second; `robustft bench knn`.

Every contender gets the same rows and queries, fp32, of unit length where it cannot normalise them
itself, and the same number of threads. `same` is the share of queries whose ids equal those of an
fp64 brute force in order as well (over some from the first to the last of those timed); for
robustft anything but 1 fails the run. `recall` counts ids in any order.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustft.benchmarks.knn_peers import PEERS, Case, Floats, contenders, unit_rows
from robustft.benchmarks.knn_reference import exact_neighbours
from robustft.benchmarks.measure import (
    Row,
    Timing,
    append_rows,
    cpu_name,
    require_rows_file,
    table,
    timed,
    versions,
)
from robustft.provenance import commit
from robustft.retrieval import CosineKNN
from robustft_kernels.answer_consistency import cores

_PACKAGES = ("robustft", "numpy", "torch", "faiss-cpu", "usearch", "scikit-learn")
_CHECKED = 16  # queries compared with the brute force


# --- corpora -------------------------------------------------------------------------------


def make_rows(kind: str, count: int, dim: int, seed: int) -> Floats:
    """[count, dim] rows: random, clustered (one in ten a duplicate), or near-tied."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, dim), dtype=np.float32)
    if kind == "clustered":
        centres = np.random.default_rng(0).standard_normal((200, dim), dtype=np.float32)
        rows *= 0.3
        rows += centres[rng.integers(len(centres), size=count)]
        twins = rng.random(count) < 0.1
        rows[twins] = rows[rng.integers(count, size=int(twins.sum()))]
    elif kind == "near-tied":  # every cosine within 0.01
        rows *= 0.05
        rows += np.random.default_rng(0).standard_normal(dim, dtype=np.float32)
    return rows


def _held_out(count: int) -> int:
    """How many of the real embeddings are queries, and no rows."""
    return min(4096, count // 2)


def _corpus(case: Case, real: Floats | None) -> tuple[Floats, Floats]:
    if case.kind == "real":
        assert real is not None
        order = np.random.default_rng(1).permutation(len(real))
        held_out = _held_out(len(real))
        return real[np.sort(order[held_out:])], real[order[np.arange(case.queries) % held_out]]
    return (
        make_rows(case.kind, case.rows, case.dim, 1),
        make_rows(case.kind, case.queries, case.dim, 2),
    )


# --- one case ------------------------------------------------------------------------------


def _blas_threads(count: int) -> AbstractContextManager[object]:
    if importlib.util.find_spec("threadpoolctl") is None:
        return ExitStack()
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(count)
    return limits


def _checked(asked: int) -> NDArray[np.int64]:
    """The queries, from the first to the last, that are compared with the brute force."""
    return np.unique(np.linspace(0, asked - 1, _CHECKED).astype(np.int64))


def _judged(ids: NDArray[np.int64], wanted: NDArray[np.int64]) -> tuple[float, float]:
    """(same order, recall) of ids [q, k]."""
    same = float((ids == wanted).all(axis=1).mean())
    hits = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(ids, wanted, strict=True)]
    return same, float(np.mean(hits))


def run_case(case: Case, real: Floats | None, budget: float, peers: Sequence[str]) -> list[Row]:
    """Rows of every contender on one case, and what the search itself counts."""
    rows, queries = _corpus(case, real)

    @functools.cache
    def expected(asked: int) -> NDArray[np.int64]:
        return exact_neighbours(rows, queries[_checked(asked)], min(case.k, len(rows)))[0]

    common: dict[str, Any] = {
        "benchmark": "knn",
        "case": str(case),
        "threads": case.threads,
        "device": cpu_name(),
        "versions": _versions(),
        "commit": commit(),
    }
    out = []
    with _blas_threads(case.threads):
        unit = unit_rows(queries)
        for contender in contenders(rows, case, peers):
            ours = contender.name.startswith("robustft")
            asked = (queries if ours else unit)[: contender.most]
            time.sleep(0.05)  # threads of the last one stop spinning
            found = np.asarray(contender.call(asked)[0])[_checked(len(asked))]
            same, recall = _judged(found, expected(len(asked)))
            timing = timed(lambda c=contender, a=asked: c.call(a), repeats=30, budget=budget)  # type: ignore[misc]
            note = f"same {same:.3f} recall {recall:.4f}"
            correct = ("yes" if same == 1 else "NO") if ours else note
            rate = len(asked) / timing.p50 * 1e3
            out.append(_row(common, contender.name, timing, rate, "queries/s", correct))
    out += _counted(rows, queries, case, common)
    return out


def _counted(rows: Floats, queries: Floats, case: Case, common: dict[str, Any]) -> list[Row]:
    index = CosineKNN(rows, threads=case.threads)
    found = index._search(queries, "float32", case.k, None, None, None, None)
    rescored = found[2]["rescored"] / len(queries)
    none = Timing(np.nan, np.nan, np.nan)
    return [
        _row(common, "robustft: rows computed in fp64", none, rescored, "a query", "-"),
        _row(
            common,
            "robustft: memory on top of the rows",
            none,
            index.extra_bytes / rows.nbytes,
            "of theirs",
            "-",
        ),
    ]


def _row(
    common: dict[str, Any], name: str, timing: Timing, rate: float, unit: str, correct: str
) -> Row:
    return Row(
        contender=name,
        ms_p20=timing.p20,
        ms_p50=timing.p50,
        ms_p80=timing.p80,
        rate=rate,
        unit=unit,
        correct=correct,
        **common,
    )


def _versions() -> str:
    """Packages and the BLAS kernels they picked."""
    found = versions(_PACKAGES)
    if importlib.util.find_spec("threadpoolctl"):
        from threadpoolctl import threadpool_info

        blas = {
            f"{i['internal_api']} {i['version']} {i.get('architecture') or ''}".strip()
            for i in threadpool_info()
            if i["user_api"] == "blas"
        }
        found += "; " + "; ".join(sorted(blas))
    return f"{found}; isa {CosineKNN(np.ones((1, 1), np.float32))._core.isa}"


# --- the machine ---------------------------------------------------------------------------


def machine_rows(threads: Sequence[int]) -> list[Row]:
    """What the machine itself reaches; empty without a C++ compiler."""
    source = Path(__file__).with_name("machine_peaks.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peaks"
        command = ["g++", "-std=c++20", "-O3", "-march=native", str(source), "-o", str(program)]
        try:
            subprocess.run([*command, "-pthread"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return []
        out = []
        for count in threads:
            text = subprocess.run(
                [str(program), str(count)], check=True, capture_output=True, text=True
            ).stdout
            for line in text.splitlines():
                name, rate, unit = line.split("\t")
                common = {
                    "benchmark": "knn",
                    "case": "machine",
                    "threads": count,
                    "device": cpu_name(),
                    "versions": "-",
                    "commit": commit(),
                }
                none = Timing(np.nan, np.nan, np.nan)
                out.append(_row(common, name, none, float(rate), unit, "-"))
    return out


# --- command -------------------------------------------------------------------------------


def ratios(rows: Sequence[Row]) -> str:
    """How many times as fast as each peer robustft is, case by case."""
    lines = []
    for (case, threads), group in itertools.groupby(rows, lambda r: (r.case, r.threads)):
        timed_rows = [r for r in group if r.unit == "queries/s"]
        ours = [r.rate for r in timed_rows if r.contender == "robustft"]
        peers = [r for r in timed_rows if not r.contender.startswith("robustft")]
        if ours and peers:
            text = "; ".join(f"{r.contender} {ours[0] / r.rate:.1f}" for r in peers)
            lines.append(f"{case} threads={threads}: x {text}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Ratios and CSV rows of every case as soon as it is done, then a table.

    Returns 1 when a gate failed.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small corpus, under a minute")
    parser.add_argument("--out", type=Path, help="append CSV rows to this file")
    parser.add_argument("--kinds", nargs="+", default=["random", "clustered"])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--dims", type=int, nargs="+", default=[384])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64, 4096])
    parser.add_argument("--ks", type=int, nargs="+", default=[10])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, cores()])
    parser.add_argument("--embeddings", type=Path, help="[N, d] float32 .npy, for the kind `real`")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a contender and case")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--no-machine", action="store_true", help="do not measure the machine")
    options = parser.parse_args(arguments)
    require_rows_file(options.out)
    if options.quick:
        options.rows, options.queries, options.kinds = [20_000], [1, 64, 1024], ["random"]
        options.threads, options.budget = options.threads[-1:], 0.5
    real = None
    if options.embeddings:
        real = np.load(options.embeddings, mmap_mode="r", allow_pickle=False)
    rows: list[Row] = []

    def add(made: list[Row]) -> None:
        rows.extend(made)
        if options.out:
            append_rows(options.out, made)

    if not options.no_machine:
        add(machine_rows(options.threads))
    shapes = itertools.product(options.kinds, options.rows, options.dims)
    for kind, count, dim in shapes:
        if kind == "real" and real is not None:
            count, dim = len(real) - _held_out(len(real)), real.shape[1]
        for queries, k, threads in itertools.product(options.queries, options.ks, options.threads):
            case = Case(kind, count, dim, queries, k, threads)
            print(case, f"threads={threads}", file=sys.stderr, flush=True)
            made = run_case(case, real, options.budget, options.peers)
            print(ratios(made), flush=True)
            add(made)
    print(table(rows))
    missing = [
        peer for peer in [*options.peers, "threadpoolctl"] if importlib.util.find_spec(peer) is None
    ]
    if missing:
        print(f"not run (not installed): {', '.join(missing)}")
    return int(any(row.correct == "NO" for row in rows))
