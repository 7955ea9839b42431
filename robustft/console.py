"""What the commands print: announcements on stderr, results on stdout."""

from __future__ import annotations

import sys
from pathlib import Path

import orjson

from robustft.cleaning import Announcement
from robustft.models import DEFAULT_MODEL
from robustft.pipeline import CleanResult
from robustft.reporting import next_steps


def print_announcement(known: Announcement) -> None:
    """First lines of a run: what was read and which models will be asked."""
    bad = f", {known.rejects} unreadable (see rejects.jsonl)" if known.rejects else ""
    print(f"robustft: {known.records} records{bad}", file=sys.stderr)
    print(f"robustft: experts: {known.model}; embeddings: {known.embedder}", file=sys.stderr)
    if known.small_models:
        print(
            f"robustft: {DEFAULT_MODEL} is a small model: fine to see how everything works, too "
            "weak for verdicts you would train on. Name a stronger one with --model.",
            file=sys.stderr,
        )
    if known.resumed:
        print("robustft: resuming; what was asked before is not asked again", file=sys.stderr)


def print_clean_summary(result: CleanResult) -> None:
    """What happened, where the files are and what to run next."""
    counts = result.counts
    print(f"{counts['input']} input lines: {counts['clean']} clean, {counts['noisy']} noisy, "
          f"{counts['rejected']} rejected")  # fmt: skip
    print(f"  kept       {counts['keep']:>8}")
    print(f"  relabeled  {counts['relabel']:>8}")
    print(f"  dropped    {counts['drop']:>8}")
    print(f"  rejected   {counts['rejected']:>8}")
    if result.weights and not result.powerless:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result.weights.items())
        print(f"votes         {shares}")
    print(f"training set  {result.cleaned}")
    print(f"verdicts      {result.out / 'verdicts.jsonl'}")
    print(f"report        {result.out / 'report.html'}")
    print(f"took          {result.seconds['total']:.0f} s")
    print("next:")
    for command in next_steps(result):
        print(f"  {command}")


def print_demo_truth(out: Path, truth: Path) -> None:
    """How the verdicts of the demo compare with the errors planted in it."""
    wrong = {
        line["id"]: line["corrupted"] for line in map(orjson.loads, truth.read_bytes().splitlines())
    }
    verdicts = [orjson.loads(line) for line in (out / "verdicts.jsonl").read_bytes().splitlines()]
    flagged = [v["id"] for v in verdicts if v["verdict"] == "noisy"]
    hits = sum(wrong[id_] for id_ in flagged)
    noisy = [v["noise_score"] for v in verdicts if wrong[v["id"]]]
    clean = [v["noise_score"] for v in verdicts if not wrong[v["id"]]]
    pairs = [(a > b) + 0.5 * (a == b) for a in noisy for b in clean]
    print(
        f"this corpus has {len(noisy)} planted errors in {len(verdicts)} records: "
        f"{hits} of the {len(flagged)} flagged are real; noise_score ranks an error above a "
        f"correct answer {sum(pairs) / len(pairs):.0%} of the time (chance: 50%)"
    )
