"""Draw the roofline of the token statistics kernels from their CSV rows, and from nothing else.

    python bench/roofline.py bench/results/token_stats.csv bench/results/linear_token_stats.csv \
        --out roofline.svg

Roofs are the limits measured in the same runs: bytes read or copied a second, and the bare matrix
product. Token statistics count 12 operations an element (maximum, difference, seven of an
exponential, two sums, a comparison); the product from hidden states counts 2 D.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

OPERATIONS = 12
SIZE = {"float32": 4, "bfloat16": 2}


def point(row: dict[str, str]) -> tuple[float, float]:
    """(operations a byte, GFLOP/s) of a row."""
    sizes = {name: int(value) for name, value in re.findall(r"([NDV])=(\d+)", row["case"])}
    size, seconds = SIZE[row["case"].split()[-1]], float(row["ms_p50"]) / 1e3
    n, v, d = sizes["N"], sizes["V"], sizes.get("D")
    if d is None:
        return OPERATIONS / size, OPERATIONS * n * v / seconds / 1e9
    return 2 * n * d * v / (size * (n * d + v * d)), 2 * n * d * v / seconds / 1e9


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--device", help="substring of the device's name (default: the last row's)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = [row for path in options.csv for row in csv.DictReader(path.open(encoding="utf-8"))]
    device = options.device or rows[-1]["device"]
    rows = [row for row in rows if device in row["device"]]
    limits = [row for row in rows if row["contender"].startswith("limit")]
    bandwidth = max(float(row["rate"]) for row in limits if row["unit"] == "GB/s")
    product = [float(row["rate"]) for row in limits if row["unit"] == "GFLOP/s"]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    marks = iter("os^vDP*XphH<>d8" * 9)
    for name in dict.fromkeys(r["contender"] for r in rows if r not in limits):
        found = [point(row) for row in rows if row["contender"] == name]
        ours = name.startswith("robustft")
        axes.scatter(*zip(*found, strict=True), marker=next(marks), label=name, s=40 + 30 * ours,
                     color="black" if ours and "," not in name else None)  # fmt: skip
    low, high = axes.get_xlim()
    intensity = [max(low, 0.5), max(high, 10.0)]
    axes.plot(intensity, [bandwidth * x for x in intensity], "--", label="bytes alone")
    if product:
        axes.axhline(max(product), linestyle=":", label="matrix product alone")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", title=device)
    axes.legend(fontsize="small")
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
