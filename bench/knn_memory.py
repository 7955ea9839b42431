"""A search over rows that do not fit in memory: resident memory and seconds.

`python bench/knn_memory.py FILE [--rows 10000000]` writes float32 rows to FILE (4 * rows *
dim bytes) unless it is there, maps it, builds an index and searches.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

from robustft.benchmarks.knn_reference import exact_neighbours
from robustft.benchmarks.measure import Row, append_rows, cpu_name, require_rows_file, versions
from robustft.provenance import commit
from robustft.retrieval import CosineKNN

_SLAB = 100_000


def write(path: Path, rows: int, dim: int) -> None:
    slab = np.random.default_rng(0).standard_normal((_SLAB, dim), dtype=np.float32)
    with path.open("wb") as file:
        for i, start in enumerate(range(0, rows, _SLAB)):
            # New directions at the price of a copy: other columns, every one of them.
            np.roll(slab, i, axis=1)[: rows - start].tofile(file)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def main(arguments: list[str] | None = None) -> int:
    """Status 1 where the neighbours are not those of the brute force."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--out", type=Path, help="append CSV rows to this file")
    options = parser.parse_args(arguments)
    require_rows_file(options.out)
    if not options.file.exists():
        write(options.file, options.rows, options.dim)
    rows = np.memmap(options.file, np.float32, "r", shape=(options.rows, options.dim))
    queries = np.random.default_rng(1).standard_normal((options.queries, options.dim))
    queries = queries.astype(np.float32)
    begin = time.perf_counter()
    index = CosineKNN(rows)
    built = time.perf_counter()
    ids, _ = index.search(queries, 10)
    searched = time.perf_counter()
    peak = peak_gib()
    ends = [0, -1]
    right = np.array_equal(ids[ends], exact_neighbours(rows, queries[ends], 10)[0])
    print(
        f"{options.rows} x {options.dim}: built in {built - begin:.1f} s, {options.queries} queries"
        f" in {searched - built:.2f} s, peak resident {peak:.2f} GiB,"
        f" the index {index.extra_bytes / 2**30:.2f} GiB, {'right' if right else 'WRONG'}"
    )
    common = {
        "benchmark": "knn",
        "case": f"mapped N={options.rows} d={options.dim} Q={options.queries} k=10",
        "threads": index._threads,
        "correct": "yes" if right else "NO",
        "device": cpu_name(),
        "versions": versions(["robustft", "numpy"]),
        "commit": commit(),
    }
    seconds = {"build": built - begin, "search": searched - built}
    if options.out:
        append_rows(
            options.out,
            [
                Row(
                    contender=f"robustft: {name}, {peak:.2f} GiB resident at most",
                    ms_p20=1e3 * value,
                    ms_p50=1e3 * value,
                    ms_p80=1e3 * value,
                    rate=(options.rows if name == "build" else options.queries) / value,
                    unit="rows/s" if name == "build" else "queries/s",
                    **common,
                )
                for name, value in seconds.items()
            ],
        )
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
