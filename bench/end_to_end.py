"""What cleaning is worth to training: LoRA on clean, noisy and cleaned answers, then accuracy.

    python bench/end_to_end.py ../shared/data/fpb runs/fpb50/cleaned.csv --work runs/end_to_end
        --out bench/results/end_to_end.csv

The folder holds `labeled.csv`, `noisy50.csv` (same rows) and `test.csv`. Every arm trains for the
same number of steps. A killed run goes on where it stopped; several processes may share the work
(`--arms`, `--seeds`), the table holds whatever is finished. What was measured on other files or
with other settings is refused: a table holds one of each.

    recovered = (cleaned - noisy) / (clean - noisy)
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustft.benchmarks.measure import device_name, versions
from robustft.config import EngineConfig, EvalConfig, TrainConfig
from robustft.devices import pick_device
from robustft.errors import UserError
from robustft.evaluation import evaluate
from robustft.provenance import commit
from robustft.records.formats import hash_files
from robustft.training import train

ARMS = ("clean", "noisy", "cleaned")
FIELDS = (
    "arm", "seed", "records", "steps", "accuracy", "low", "high", "macro_f1", "seconds",
    "device", "versions", "commit", "date",
)  # fmt: skip
SETTINGS = ("limit", "steps", "batch_size", "learning_rate", "top_layers", "dtype")
PACKAGES = ("robustft", "torch", "transformers", "peft")


def inputs(arm: str, options: argparse.Namespace) -> tuple[Path, Path]:
    """What an arm trains on, and the test file."""
    files = {
        "clean": options.folder / "labeled.csv",
        "noisy": options.folder / "noisy50.csv",
        "cleaned": options.cleaned,
    }
    return files[arm], options.test or options.folder / "test.csv"


def settings(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """All that an arm's accuracy depends on beside its seed; of the files their hashes."""
    data, test = inputs(arm, options)
    chosen = {name: getattr(options, name) for name in SETTINGS}
    return chosen | {"training file": hash_files([data]), "test file": hash_files([test])}


def finished(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row in the work folder. Raises UserError where one has other settings than these."""
    rows = []
    for path in options.work.glob("*/accuracy.json"):
        row = json.loads(path.read_bytes())
        before, now = row.pop("settings", {}), settings(row["arm"], options)
        changed = [name for name in now if name not in before or before[name] != now[name]]
        if changed:
            raise UserError(
                f"{path}: was not measured with the same {', '.join(changed)}; repeat the old "
                "settings or choose another --work"
            )
        rows.append(row)
    return sorted(rows, key=lambda row: (row["seed"], ARMS.index(row["arm"])))


def run(arm: str, seed: int, options: argparse.Namespace) -> None:
    """Train and evaluate one arm with one seed, unless that is done already."""
    folder = options.work / f"{arm}-{seed}"
    found = folder / "accuracy.json"
    if found.exists():
        return
    used = settings(arm, options)
    data, test = inputs(arm, options)
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
        round(trained.history.seconds), device_name(pick_device(engine.device).type),
        versions(PACKAGES), commit(), datetime.date.today().isoformat(),
    )  # fmt: skip
    row = dict(zip(FIELDS, values, strict=True)) | {"settings": used}
    found.write_text(json.dumps(row), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
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
    options = parser.parse_args(arguments)
    finished(options)  # refused before hours of training, not after
    for seed in options.seeds:
        for arm in options.arms:
            run(arm, seed, options)
    rows = finished(options)
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
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
