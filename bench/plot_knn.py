"""`python bench/plot_knn.py bench/results/knn.csv knn.svg`: bars drawn from the CSV alone."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def main(source: Path, target: Path) -> None:
    with source.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["unit"] == "queries/s"]
    rows = [row for row in rows if not row["case"].startswith("mapped")]
    ours: dict[tuple[str, str], float] = {}
    ratios: dict[tuple[str, str, str], float] = {}
    for row in rows:  # in a run, robustft comes before its peers
        case, rate = (row["case"], row["threads"]), float(row["rate"])
        if row["contender"] == "robustft":
            ours[case] = rate
        else:
            ratios[*case, row["contender"]] = ours[case] / rate
    cases = list(ours)
    names = list(dict.fromkeys(name for _, _, name in ratios))
    figure, axes = plt.subplots(figsize=(9, 0.9 * len(cases) + 1.5), layout="constrained")
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        bars = [
            (line - 0.4 + place * height, ratios[*case, name])
            for line, case in enumerate(cases)
            if (*case, name) in ratios
        ]
        axes.barh([at for at, _ in bars], [ratio for _, ratio in bars], height, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), [f"{case}, {threads} threads" for case, threads in cases])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("robustft is so many times as fast (queries a second, same run)")
    axes.legend(fontsize="small")
    figure.savefig(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
