"""What `score` says of what it did."""

from __future__ import annotations

from pathlib import Path

from robustft.scoring import ScoreSummary


def test_ids_from_the_data_are_printed_as_one_harmless_line() -> None:
    summary = ScoreSummary(Path("scores.jsonl"))
    line = {"id": "r1\x1b[2J\nfaked", "tokens": 3, "nll": 0.5, "truncated": 2}
    summary.add(line, resumed=False)
    (told,) = [line for line in str(summary).splitlines() if line.startswith("truncated")]
    assert told.endswith(r"the response its end: r1\x1b[2J\nfaked")
