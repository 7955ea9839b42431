"""What cleaning is worth to training: LoRA on clean, noisy and cleaned answers, then accuracy.

    python bench/end_to_end.py ../shared/data/fpb runs/fpb50/cleaned.csv --work runs/end_to_end
        --out bench/results/end_to_end.csv

The folder holds `labeled.csv`, `noisy50.csv` (same rows) and `test.csv`. Every arm trains for the
same number of steps. A killed run goes on where it stopped; several
processes may share the work (`--arms`, `--seeds`), the table holds whatever is finished.

    recovered = (cleaned - noisy) / (clean - noisy)
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

from robustft.config import EngineConfig, EvalConfig, TrainConfig
from robustft.evaluation import evaluate
from robustft.training import train

ARMS = ("clean", "noisy", "cleaned")
FIELDS = ("arm", "seed", "records", "steps", "accuracy", "low", "high", "macro_f1", "seconds")


def run(arm: str, data: Path, test: Path, seed: int, options: argparse.Namespace) -> None:
    """Train and evaluate one arm with one seed, unless that is done already."""
    folder = options.work / f"{arm}-{seed}"
    found = folder / "accuracy.json"
    if found.exists():
        return
    engine = EngineConfig(dtype=options.dtype)
    trained = train(
        TrainConfig(
            input=str(data), out=folder / "adapter", seed=seed, limit=options.limit,
            steps=options.steps, batch_size=options.batch_size, top_layers=options.top_layers,
            learning_rate=options.learning_rate, engine=engine,
        )
    )  # fmt: skip
    score = evaluate(EvalConfig(input=str(test), adapter=folder / "adapter", engine=engine))
    low, high = score.overall.interval
    values = (
        arm, seed, trained.records, trained.history.step, round(score.overall.accuracy, 4),
        round(low, 4), round(high, 4), round(score.macro_f1 or 0.0, 4),
        round(trained.history.seconds),
    )  # fmt: skip
    found.write_text(json.dumps(dict(zip(FIELDS, values, strict=True))), encoding="utf-8")


def main() -> None:
    """Run what is missing, print the table and, with --out, write it as CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("cleaned", type=Path, help="what `robustft clean` made of noisy50.csv")
    parser.add_argument("--work", type=Path, required=True, help="adapters and accuracies")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--test", type=Path, help="another test file")
    parser.add_argument("--limit", type=int, help="only the first records of every arm")
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--top-layers", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    files = {
        "clean": options.folder / "labeled.csv",
        "noisy": options.folder / "noisy50.csv",
        "cleaned": options.cleaned,
    }
    test = options.test or options.folder / "test.csv"
    for seed in options.seeds:
        for arm in options.arms:
            run(arm, files[arm], test, seed, options)
    rows = [json.loads(path.read_bytes()) for path in options.work.glob("*/accuracy.json")]
    rows.sort(key=lambda row: (row["seed"], ARMS.index(row["arm"])))
    by_arm = {arm: [row["accuracy"] for row in rows if row["arm"] == arm] for arm in ARMS}
    for arm, values in by_arm.items():
        if values:
            print(f"{arm:<8} {sum(values) / len(values):.4f}  {values}")
    if all(by_arm.values()):
        clean, noisy, cleaned = (sum(v) / len(v) for v in by_arm.values())
        print(f"recovered {(cleaned - noisy) / max(clean - noisy, 1e-9):.1%}")
    for target in (sys.stdout, *([options.out.open("w", newline="")] if options.out else [])):
        writer = csv.DictWriter(target, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
