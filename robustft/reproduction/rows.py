"""From cells to rows with means and intervals, and rows to CSV and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

import numpy as np
from scipy.stats import t as student

from robustft.metrics import Tally
from robustft.reproduction.categories import by_category
from robustft.reproduction.cells import Outcome
from robustft.reproduction.tasks import TASKS

CHANGE = "Δ"  # begins the name of a row that holds a relative change, as in the paper


@dataclass(slots=True)
class Row:
    """One line of a table: the same thing over several seeds, of one category or of all."""

    name: str  # what stands in the first column
    task: str
    noise: int | None
    outcomes: list[Outcome] = field(default_factory=list)
    paper: float | None = None  # percent
    values: list[float] = field(default_factory=list)  # percent, one a seed that was run
    reason: str = ""
    category: str = ""  # of the test records that count; empty: all
    tally: Tally | None = None  # of that category, by the first seed

    @classmethod
    def of(
        cls, name: str, task: str, noise: int | None, outcomes: Sequence[Outcome],
        paper: float | None = None,
    ) -> Row:  # fmt: skip
        """The row of outcomes that differ in their seed alone, or in seed and instruction.

        With instructions there is one value for each of them: its mean over the seeds.
        """
        repeated: dict[object, list[float]] = {}
        for outcome in outcomes:
            if outcome.result is not None:
                cell = outcome.cell
                key = cell.seed if cell.instruction is None else cell.instruction
                repeated.setdefault(key, []).append(outcome.accuracy)
        values = [fmean(found) for found in repeated.values()]
        reason = next((outcome.reason for outcome in outcomes if outcome.result is None), "")
        return cls(name, task, noise, list(outcomes), paper, values, reason)

    def by_category(self) -> list[Row]:
        """A row for each category of the test records; itself where none are known."""
        found: dict[str, list[Tally]] = {}
        for outcome in self.outcomes:
            known = {} if outcome.result is None else by_category(outcome.result.categories)
            for name, tally in known.items():
                found.setdefault(name, []).append(tally)
        return [
            dataclasses.replace(
                self, category=name, values=[100 * one.accuracy for one in tallies],
                tally=tallies[0],
            )
            for name, tallies in found.items()
        ] or [self]  # fmt: skip

    @property
    def place(self) -> tuple[str, str, int | None]:
        """Where a table has it: line, column, noise. Categories are lines, methods then columns."""
        if not self.category:
            return self.name, self.task, self.noise
        return self.category, f"{self.name}, {self.task.upper()}", self.noise

    @property
    def mean(self) -> float:
        """Mean over the seeds, percent; NaN where nothing was run."""
        return fmean(self.values) if self.values else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 %: Student's over seeds or instructions; where all agree, Wilson's over test records.

        Values that agree exactly come from what does not depend on the seed, above all from models
        that are not trained: they say nothing about the spread.
        """
        if len(set(self.values)) > 1:
            n = len(self.values)
            half = float(student.ppf(0.975, n - 1)) * stdev(self.values) / math.sqrt(n)
            return max(self.mean - half, 0.0), min(self.mean + half, 100.0)
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
    def metric(self) -> str:
        """What is counted: accuracy, or exact match by a metric that has an F1 too."""
        return TASKS[self.task].metric

    @property
    def f1(self) -> float:
        """Mean F1 in percent beside the exact match of all test records; NaN elsewhere."""
        if self.metric != "exact match" or self.category:
            return math.nan
        run = [outcome.result.f1 for outcome in self.outcomes if outcome.result is not None]
        return 100 * fmean(run) if run else math.nan

    @property
    def perplexities(self) -> tuple[float, float, float]:
        """10 %, 50 % and 90 % quantiles over test records and seeds; NaN where none are known."""
        found = [value for outcome in self.outcomes for value in outcome.perplexities]
        low, median, high = np.quantile(found or [math.nan], (0.1, 0.5, 0.9)).tolist()
        return low, median, high

    @property
    def test_records(self) -> int:
        """How many test records an accuracy rests on."""
        run = [outcome.result for outcome in self.outcomes if outcome.result is not None]
        return self.tally.total if self.tally else run[0].overall.total if run else 0


FIELDS = (
    "row", "task", "noise", "metric", "accuracy", "low", "high", "deviation", "f1", "macro_f1",
    "paper", "seeds", "test_records", "trained_on", "steps", "perplexity_p10", "perplexity_p50",
    "perplexity_p90", "note",
)  # fmt: skip


def to_csv(rows: Iterable[Row]) -> str:
    """One line a row; `macro_f1` in [0, 1], else percent; empty where unknown.

    `metric` says what `accuracy` is and what the paper's number is compared with.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        low, high = row.interval
        run = [o for o in row.outcomes if o.result is not None]
        f1 = [o.result.macro_f1 for o in run if o.result and o.result.macro_f1 is not None]
        whole = f1 and not row.category
        line, column, noise = row.place
        values = {
            "row": line,
            "task": column,
            "noise": "" if noise is None else noise,
            "metric": row.metric,
            "accuracy": _number(row.mean, 2),
            "low": _number(low, 2),
            "high": _number(high, 2),
            "deviation": _number(row.deviation, 2),
            "f1": _number(row.f1, 2),
            "macro_f1": _number(fmean(f1), 4) if whole else "",
            "paper": "" if row.paper is None else row.paper,
            "seeds": " ".join(dict.fromkeys(str(o.cell.seed) for o in run)),
            "test_records": row.test_records or "",
            "trained_on": run[0].kept or "" if run else "",
            "steps": run[0].steps or "" if run else "",
            "note": row.reason or _remark(run),
        }
        names = ("perplexity_p10", "perplexity_p50", "perplexity_p90")
        values |= {n: _number(q, 4) for n, q in zip(names, row.perplexities, strict=True)}
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

    Each with its interval, or with the standard deviation over its values. What is best on the same
    test records and noise, of one model, is bold.
    """
    columns = list(dict.fromkeys(row.place[1:] for row in rows))
    names = list(dict.fromkeys(row.place[0] for row in rows))
    at = {row.place: row for row in rows}
    best = _best(rows)
    lines = [f"# {title}", ""]
    lines.append("| | " + " | ".join(_heading(task, noise) for task, noise in columns) + " |")
    lines.append("| --- |" + " --- |" * len(columns))
    reasons: dict[str, int] = {}  # why cells were not run -> their number below the table
    for row in rows:
        if not row.values and row.reason:
            reasons.setdefault(row.reason, len(reasons) + 1)
    for name in names:
        cells = [_cell(at.get((name, *column)), best, reasons, deviation) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    told = [f"[{n}] {reason.removeprefix('not run: ')}\n" for reason, n in reasons.items()]
    lines += ["", *told, *notes]
    return "\n".join(lines)


def _heading(task: str, noise: int | None) -> str:
    return task.upper() if noise is None else f"{task.upper()} {noise} %"


def _rivals(row: Row) -> tuple[str, int | None, str, str | None]:
    """What rows share that can be compared: the test records, the noise and the model at hand."""
    model = row.outcomes[0].cell.model if row.outcomes else None
    return row.task, row.noise, row.category, model


def _best(rows: Iterable[Row]) -> dict[object, float]:
    """The best mean among rivals; none where all are equal."""
    means: dict[object, list[float]] = {}
    for row in rows:
        if row.values and not row.name.startswith(CHANGE):
            means.setdefault(_rivals(row), []).append(row.mean)
    return {rivals: max(found) for rivals, found in means.items() if min(found) < max(found)}


def _cell(
    row: Row | None, best: Mapping[object, float], reasons: Mapping[str, int], deviation: bool
) -> str:
    if row is None:
        return ""
    printed = "" if row.paper is None else f" ({row.paper:g})"
    if not row.values:
        why = f" [{reasons[row.reason]}]" if row.reason else ""
        return f"not run{why}{printed}"
    if row.name.startswith(CHANGE):
        return f"{row.mean:+.1f} %"
    star = r"\*" if any(outcome.powerless for outcome in row.outcomes) else ""
    text = f"{row.mean:.1f}"
    text = f"**{text}**" if row.mean >= best.get(_rivals(row), math.inf) else text
    if deviation and not math.isnan(row.deviation):
        spread = f"± {row.deviation:.1f}"
    else:
        low, high = row.interval
        spread = f"[{low:.1f}, {high:.1f}]"
    run, planned = sum(o.result is not None for o in row.outcomes), len(row.outcomes)
    lacking = f", {run} of {planned} {'runs' if deviation else 'seeds'}" if run < planned else ""
    f1 = "" if math.isnan(row.f1) else f", F1 {row.f1:.1f}"
    low, median, high = row.perplexities
    perplexity = "" if math.isnan(median) else f", perplexity {median:.2f} [{low:.2f}, {high:.2f}]"
    return f"{text}{star} {spread}{f1}{perplexity}{lacking}{printed}"
