"""From cells to rows with means and intervals, and rows to CSV and Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

import numpy as np

from robustft.metrics import Tally
from robustft.reproduction.cells import Outcome

CHANGE = "Δ"  # begins the name of a row that holds a relative change, as in the paper
# Student's t at 97.5 % by degrees of freedom; beyond, the normal's.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(slots=True)
class Row:
    """One line of a table: the same thing over several seeds."""

    name: str  # what stands in the first column
    task: str
    noise: int | None
    outcomes: list[Outcome] = field(default_factory=list)
    paper: float | None = None  # percent
    values: list[float] = field(default_factory=list)  # percent, one a seed that was run
    reason: str = ""
    tally: Tally | None = None  # of a part of the test set; else all of it counts

    @classmethod
    def of(
        cls, name: str, task: str, noise: int | None, outcomes: Sequence[Outcome],
        paper: float | None = None,
    ) -> Row:  # fmt: skip
        """The row of some outcomes that differ in their seed alone."""
        values = [outcome.accuracy for outcome in outcomes if outcome.result is not None]
        reason = next((outcome.reason for outcome in outcomes if outcome.result is None), "")
        return cls(name, task, noise, list(outcomes), paper, values, reason)

    @property
    def mean(self) -> float:
        """Mean over the seeds, percent; NaN where nothing was run."""
        return fmean(self.values) if self.values else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 %: Student's over seeds, where there are several; else Wilson's over test records."""
        if len(self.values) > 1:
            n = len(self.values)
            factor = _T[n - 2] if n - 2 < len(_T) else 1.96
            half = factor * stdev(self.values) / math.sqrt(n)
            return self.mean - half, self.mean + half
        result = next((o.result for o in self.outcomes if o.result is not None), None)
        tally = self.tally or (result.overall if result else None)
        if tally is None:
            return math.nan, math.nan
        low, high = tally.interval
        return 100 * low, 100 * high

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds or instructions, percent; NaN for a single one."""
        return stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def test_records(self) -> int:
        """How many test records an accuracy rests on."""
        run = [outcome.result for outcome in self.outcomes if outcome.result is not None]
        return self.tally.total if self.tally else run[0].overall.total if run else 0


FIELDS = (
    "row", "task", "noise", "accuracy", "low", "high", "deviation", "macro_f1", "paper", "seeds",
    "test_records", "trained_on", "steps", "perplexity_p10", "perplexity_p50", "perplexity_p90",
    "note",
)  # fmt: skip


def to_csv(rows: Iterable[Row]) -> str:
    """One line a row; accuracies in percent, `macro_f1` in [0, 1], empty where unknown."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        low, high = row.interval
        run = [o for o in row.outcomes if o.result is not None]
        f1 = [o.result.macro_f1 for o in run if o.result and o.result.macro_f1 is not None]
        whole = f1 and row.tally is None
        perplexities = [value for outcome in run for value in outcome.perplexities]
        quantiles = np.quantile(perplexities, (0.1, 0.5, 0.9)) if perplexities else [math.nan] * 3
        values = {
            "row": row.name,
            "task": row.task,
            "noise": "" if row.noise is None else row.noise,
            "accuracy": _number(row.mean, 2),
            "low": _number(low, 2),
            "high": _number(high, 2),
            "deviation": _number(row.deviation, 2),
            "macro_f1": _number(fmean(f1), 4) if whole else "",
            "paper": "" if row.paper is None else row.paper,
            "seeds": " ".join(dict.fromkeys(str(o.cell.seed) for o in run)),
            "test_records": row.test_records or "",
            "trained_on": run[0].kept or "" if run else "",
            "steps": run[0].steps or "" if run else "",
            "note": row.reason or _remark(run),
        }
        names = ("perplexity_p10", "perplexity_p50", "perplexity_p90")
        values |= {n: _number(float(q), 4) for n, q in zip(names, quantiles, strict=True)}
        writer.writerow(values)
    return text.getvalue()


def _remark(run: Sequence[Outcome]) -> str:
    if any(outcome.powerless for outcome in run):
        return "no expert better than chance: nothing was changed"
    return ""


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def to_markdown(
    rows: Sequence[Row], title: str, notes: Sequence[str], *, deviation: bool = False
) -> str:
    """A table of rows against task and noise, the paper's numbers in brackets.

    Each with its interval, or with the standard deviation over its values.
    """
    columns = list(dict.fromkeys((row.task, row.noise) for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    at = {(row.name, row.task, row.noise): row for row in rows}
    best = _best(rows)
    lines = [f"# {title}", ""]
    lines.append("| | " + " | ".join(_heading(task, noise) for task, noise in columns) + " |")
    lines.append("| --- |" + " --- |" * len(columns))
    for name in names:
        cells = [_cell(at.get((name, *column)), best.get(column), deviation) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *notes, ""]
    return "\n".join(lines)


def _heading(task: str, noise: int | None) -> str:
    return task.upper() if noise is None else f"{task.upper()} {noise} %"


def _best(rows: Iterable[Row]) -> Mapping[tuple[str, int | None], float]:
    best: dict[tuple[str, int | None], float] = {}
    for row in rows:
        if row.values and not row.name.startswith(CHANGE):
            key = row.task, row.noise
            best[key] = max(best.get(key, -math.inf), row.mean)
    return best


def _cell(row: Row | None, best: float | None, deviation: bool) -> str:
    if row is None:
        return ""
    printed = "" if row.paper is None else f" ({row.paper:g})"
    if not row.values:
        return f"{row.reason or 'not run'}{printed}".replace("|", "/")
    if row.name.startswith(CHANGE):
        return f"{row.mean:+.1f} %"
    low, high = row.interval
    star = r"\*" if any(outcome.powerless for outcome in row.outcomes) else ""
    text = f"{row.mean:.1f}"
    text = f"**{text}**" if best is not None and row.mean >= best else text
    spread = f" ± {row.deviation:.1f}" if deviation else f" [{low:.1f}, {high:.1f}]"
    return f"{text}{star}{spread}{printed}"
