"""Hold what other engines found to what this process found: verdicts, or scores of given answers.

    compare_engines.py REFERENCE OTHER...

Each is the `verdicts.jsonl` of `robustft clean`, or each what `robustft score` wrote, of the same
records. Every difference is shown. Exit status 1: fewer than 98 of 100 verdicts are the same, or a
score differs by more than 1e-3 nats.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SAME_VERDICTS = 0.98
SCORE_TOLERANCE = 1e-3  # nats
VERDICT = ("verdict", "action", "answer")
SCORES = ("nll", "margin")  # what an engine without the whole vocabulary can tell


def rows(path: Path) -> list[Row]:
    """The lines of `path`, in the order of their ids."""
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(read, key=lambda row: str(row["id"]))


def verdict(row: Row) -> str:
    """What was found and done, on one line."""
    return " ".join(str(row[field]) for field in VERDICT)


def opinions(row: Row) -> str:
    """The answers and probabilities of every expert, on one line."""
    told = []
    for name, opinion in row["experts"].items():
        shares = ", ".join(f"{share:.4f}" for share in opinion.get("probabilities") or [])
        told.append(f"{name} {opinion['answer']}" + (f" [{shares}]" if shares else ""))
    return ", ".join(told)


def hold_verdicts(reference: list[Row], other: list[Row]) -> tuple[str, bool]:
    """What to print, and whether enough verdicts are the same."""
    pairs = list(zip(reference, other, strict=True))
    differing = [pair for pair in pairs if len({verdict(row) for row in pair}) > 1]
    gaps = [
        abs(opinion["nll"] - two["experts"][name]["nll"])
        for one, two in pairs
        for name, opinion in one["experts"].items()
        if opinion["answer"] == two["experts"].get(name, {}).get("answer")
        and None not in (opinion.get("nll"), two["experts"][name].get("nll"))
    ]
    same = len(pairs) - len(differing)
    lines = [f"{same} of {len(pairs)} verdicts, actions and labels are the same"]
    if gaps:
        lines.append(f"  log-probabilities of equal answers: within {max(gaps):.1e} nats")
    for pair in differing:
        lines.append(f"  {pair[0]['id']}: {' | '.join(verdict(row) for row in pair)}")
        lines += [f"    {opinions(row)}" for row in pair]
    return "\n".join(lines), same >= SAME_VERDICTS * len(pairs)


def hold_scores(reference: list[Row], other: list[Row]) -> tuple[str, bool]:
    """What to print, and whether every score agrees."""
    worst = 0.0
    for one, two in zip(reference, other, strict=True):
        if one["tokens"] != two["tokens"]:
            return f"{one['id']}: {one['tokens']} tokens | {two['tokens']} tokens", False
        for field in SCORES:
            gap = abs(one[field] - two[field])
            worst = math.inf if math.isnan(gap) else max(worst, gap)
    return f"{len(reference)} scores within {worst:.1e} nats", worst <= SCORE_TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("reference", type=Path)
    parser.add_argument("others", type=Path, nargs="+")
    args = parser.parse_args()
    reference = rows(args.reference)
    good = True
    for path in args.others:
        other = rows(path)
        if [row["id"] for row in reference] != [row["id"] for row in other]:
            print(f"{path}: other records than {args.reference}")
            return 1
        hold = hold_verdicts if "verdict" in reference[0] else hold_scores
        shown, held = hold(reference, other)
        print(f"{path}: {shown}")
        good &= held
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
