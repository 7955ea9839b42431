"""The report's figures: small functions, each returning one inline <svg>.

Drawn 360 units wide, the width of a phone, so that labels stay readable there; colours come from
the style sheet's classes, so that light and dark need no second drawing. Every figure carries a
sentence for screen readers and every mark a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from robustft.report import markup
from robustft.report.data import Histogram

WIDTH = 360


@dataclass(frozen=True, slots=True)
class Series:
    """One coloured series; `tone` names a class of the style sheet (keep, relabel, drop …)."""

    name: str
    tone: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One horizontal bar: its name, its length, and the text at its end."""

    name: str
    value: float
    text: str
    tone: str


def share_bar(parts: Sequence[tuple[Series, int]]) -> str:
    """One stacked bar, full width: how a whole splits into parts."""
    whole = sum(number for _, number in parts)
    left, marks = 0.0, []
    for series, number in parts:
        width = WIDTH * number / whole if whole else 0.0
        if number:
            marks.append(
                f'<rect class="{series.tone}" x="{left:.2f}" y="0" width="{width:.2f}" height="20">'
                f"<title>{series.name}: {number:,} ({markup.percent(number, whole)})</title></rect>"
            )
        left += width
    said = ", ".join(f"{number:,} {series.name}" for series, number in parts)
    return _svg(20, "".join(marks), said or "nothing", extra='preserveAspectRatio="none"')


def histogram(
    layers: Sequence[tuple[Series, Histogram]],
    x_label: str,
    threshold: tuple[float, str] | None = None,
) -> str:
    """Stacked histogram over a shared range; `threshold` is a marked x with its label."""
    first = layers[0][1]
    if any(
        (h.low, h.high, len(h.counts)) != (first.low, first.high, len(first.counts))
        for _, h in layers
    ):
        raise ValueError("layers must share their range and number of bins")
    top, base, left = 30.0, 150.0, 34.0
    bins, plot = len(first.counts), WIDTH - left - 8
    tallest = max(1, *(sum(h.counts[i] for _, h in layers) for i in range(bins)))
    ceiling = _round_up(tallest)
    step = (first.high - first.low) / bins
    marks = [_y_axis(ceiling, top, base, left)]
    for i in range(bins):
        y = base
        for series, h in layers:
            height = (base - top) * h.counts[i] / ceiling
            y -= height
            if h.counts[i]:
                low = first.low + i * step
                marks.append(
                    f'<rect class="{series.tone}" x="{left + plot * i / bins + 0.5:.2f}" '
                    f'y="{y:.2f}" width="{plot / bins - 1:.2f}" height="{height:.2f}">'
                    f"<title>{_number(low)} to {_number(low + step)}: "
                    f"{h.counts[i]:,} {series.name}</title></rect>"
                )
    for value in _ticks(first.low, first.high):
        x = left + plot * (value - first.low) / (first.high - first.low)
        marks.append(f'<text class="tick mid" x="{x:.1f}" y="{base + 15}">{_number(value)}</text>')
    marks.append(
        f'<text class="axis mid" x="{left + plot / 2:.1f}" y="{base + 32}">{x_label}</text>'
    )
    if threshold is not None and first.low <= threshold[0] <= first.high:
        x = left + plot * (threshold[0] - first.low) / (first.high - first.low)
        anchor = "end" if x > WIDTH / 2 else "start"
        shift = -5 if anchor == "end" else 5
        marks.append(
            f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 18}" y2="{base}"/>'
            f'<text class="tick" text-anchor="{anchor}" x="{x + shift:.1f}" y="{top - 9}">'
            f"{threshold[1]}</text>"
        )
    said = "; ".join(f"{series.name}: {h.total:,} values" for series, h in layers)
    return _svg(190, "".join(marks), f"Histogram of {x_label}. {said}.")


def before_after(before: Mapping[str, int], after: Mapping[str, int], limit: int = 10) -> str:
    """Two bars per answer, before above after; only the `limit` commonest answers."""
    names = sorted(
        {**before, **after}, key=lambda name: (-max(before.get(name, 0), after.get(name, 0)), name)
    )[:limit]
    names.sort()
    largest = max(1, *(max(before.get(name, 0), after.get(name, 0)) for name in names))
    row, plot = 54.0, WIDTH - 84.0
    marks = []
    for index, name in enumerate(names):
        y = index * row
        label = markup.plain(name, 44) + "…" * (len(name) > 44)
        marks.append(f'<text class="label" x="0" y="{y + 12}">{label}</text>')
        for offset, tone, numbers in ((17, "before", before), (32, "after", after)):
            number = numbers.get(name, 0)
            width = max(plot * number / largest, 1.5 if number else 0.0)
            marks.append(
                f'<rect class="{tone}" x="0" y="{y + offset:.1f}" width="{width:.2f}" '
                f'height="13" rx="2"><title>{label} {tone}: {number:,}</title></rect>'
                f'<text class="tick" x="{width + 5:.1f}" y="{y + offset + 10.5:.1f}">'
                f"{number:,} · {markup.percent(number, sum(numbers.values()))}</text>"
            )
    return _svg(int(len(names) * row), "".join(marks), "Answers before and after cleaning.")


def bars(rows: Sequence[Bar], said: str, full: float = 0.0) -> str:
    """One horizontal bar a row; `full` is the length that fills the width, else the longest is."""
    longest = max([full, *(bar.value for bar in rows)]) or 1.0
    height, marks = 34.0, []
    for index, bar in enumerate(rows):
        y = index * height
        width = max(WIDTH * bar.value / longest, 1.5 if bar.value else 0.0)
        name = markup.plain(bar.name, 44) + "…" * (len(bar.name) > 44)
        marks.append(
            f'<text class="label" x="0" y="{y + 12}">{name}</text>'
            f'<text class="tick end" x="{WIDTH}" y="{y + 12}">{markup.plain(bar.text)}</text>'
            f'<rect class="track" x="0" y="{y + 17}" width="{WIDTH}" height="8" rx="3"/>'
            f'<rect class="{bar.tone}" x="0" y="{y + 17}" width="{width:.2f}" height="8" rx="3"/>'
        )
    return _svg(int(len(rows) * height), "".join(marks), said)


def gauge(share: float) -> str:
    """A small bar beside a number in [0, 1]."""
    return (
        '<svg class="gauge" viewBox="0 0 56 8" aria-hidden="true">'
        '<rect class="track" width="56" height="8" rx="3"/>'
        f'<rect class="noisy" width="{56 * share:.1f}" height="8" rx="3"/></svg>'
    )


def _svg(height: int, inner: str, said: str, extra: str = "") -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" {extra} '
        f'aria-label="{markup.plain(said, 400)}">{inner}</svg>'
    )


def _y_axis(ceiling: int, top: float, base: float, left: float) -> str:
    marks = []
    for part in (0, 1, 2):
        y = base - (base - top) * part / 2
        kind = "zero" if part == 0 else "grid"
        value = ceiling * part / 2
        if value == int(value):
            marks.append(
                f'<line class="{kind}" x1="{left}" x2="{WIDTH - 8}" y1="{y}" y2="{y}"/>'
                f'<text class="tick end" x="{left - 5}" y="{y + 3.5}">{_short(int(value))}</text>'
            )
    return "".join(marks)


def _round_up(value: int) -> int:
    """The next of 1, 2, 4, 6, 8, 10 times a power of ten: halves stay whole numbers."""
    power = 1
    while value > 10 * power:
        power *= 10
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers in [low, high], as far as there are that many."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(
        part * power for part in (0.2, 0.25, 0.5, 1.0, 2.0) if high - low <= 5 * part * power
    )
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: int) -> str:
    """At most five characters: 950, 12k, 3.4M."""
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return str(value)


def _number(value: float) -> str:
    return f"{value:.3g}"
