"""How well the crowd's learners find wrong labels on real corpora; truth is used for scoring only.

    python bench/detection.py ../shared/data/fpb [--out bench/results/detection.csv]

The folder holds `labeled.csv` (truth) and `noisy30.csv`, `noisy50.csv` (same rows). No language
model is asked: this is what the regression and the neighbour vote on sentence embeddings add to
the panel. Beside them stand what the label frequencies alone give and what flagging all gives.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score

from robustft import crowd
from robustft.embedding import Embedder
from robustft.prompts import LETTERS
from robustft.records import Record, open_records
from robustft.retrieval import CosineKNN

FIELDS = (
    *("corpus", "noise", "detector", "records"),
    *("auroc", "auroc_low", "auroc_high", "f1", "right_label"),
)
RESAMPLES = 500


def interval(wrong: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the AUROC."""
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(wrong), size=len(wrong)) for _ in range(RESAMPLES))
    found = [roc_auc_score(wrong[d], score[d]) for d in draws if 0 < wrong[d].sum() < len(d)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def read(path: Path) -> list[Record]:
    """The readable records of a file."""
    return [record for record in open_records(str(path)) if isinstance(record, Record)]


def main() -> None:
    """Print the table and, with --out, write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    records = read(options.folder / "labeled.csv")
    if len({r.options for r in records}) != 1 or records[0].options is None:
        sys.exit("the records do not share one set of options: nothing can learn from letters")
    classes = len(records[0].options)
    truth = np.array([LETTERS.index(r.answer) for r in records])
    embeddings = Embedder().encode([r.question for r in records])
    index = CosineKNN(embeddings)
    rows: list[tuple[object, ...]] = []
    for noise in (30, 50):
        noisy = read(options.folder / f"noisy{noise}.csv")
        given = np.array([LETTERS.index(r.answer) for r in noisy])
        wrong = given != truth
        experts = {
            "regression": crowd.regression_expert(embeddings, given, classes),
            "neighbours": crowd.neighbour_expert(index, given, classes),
        }
        frequencies = np.tile(crowd.label_frequencies(given, classes), (len(given), 1))
        table = {"label frequencies": frequencies} | experts
        table["crowd"] = crowd.pool(experts, given, classes).probabilities
        corpus = (options.folder.name, noise)
        for name, values in table.items():
            score = 1.0 - values[np.arange(len(given)), given]
            best = values.argmax(1)
            figures = (
                roc_auc_score(wrong, score),
                *interval(wrong, score),
                f1_score(wrong, best != given),
                (best == truth).mean(),
            )
            rows.append((*corpus, name, len(given), *(f"{figure:.4f}" for figure in figures)))
        everything = f1_score(wrong, np.ones_like(wrong))
        rows.append((*corpus, "flag all", len(given), "0.5000", "", "", f"{everything:.4f}", ""))
    writer = csv.writer(sys.stdout)
    writer.writerow(FIELDS)
    writer.writerows(rows)
    if options.out:
        with options.out.open("w", newline="") as handle:
            csv.writer(handle).writerows([FIELDS, *rows])


if __name__ == "__main__":
    main()
