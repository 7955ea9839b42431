"""The figures, drawn from rows with matplotlib: NAME.png and NAME.svg."""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustft.errors import UserError
from robustft.files import replacing
from robustft.reproduction.rows import CHANGE, Row
from robustft.reproduction.studies import Study

# Okabe and Ito's palette: told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_PAPER = "#999999"


def require_matplotlib() -> None:
    """Raise UserError where figures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("figures need matplotlib: pip install 'robustft[figures]'")


def draw(study: Study, rows: Sequence[Row], base: Path) -> list[Path]:
    """Write the study's figure as PNG and SVG; nothing where no row has a number."""
    rows = [row for row in rows if row.values and not row.name.startswith(CHANGE)]
    if not rows:
        return []
    os.environ.setdefault("MPLCONFIGDIR", tempfile.gettempdir())
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "svg.hashsalt": "robustft", "svg.fonttype": "none", "figure.dpi": 110}
    )  # fmt: skip
    drawers: dict[str, Callable[[Sequence[Row]], Any]] = {
        "fig1": _against_noise, "fig3": _sensitivity, "fig4": _perplexity, "fig5": _radar,
        "fig6": _stability,
    }  # fmt: skip
    figure = drawers.get(study.name, _dots)(rows)
    figure.suptitle(study.title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    files = []
    for suffix in (".png", ".svg"):
        path = base.with_suffix(suffix)
        with replacing(path) as temporary:
            figure.savefig(temporary, format=suffix[1:], bbox_inches="tight",
                           metadata={"Date": None} if suffix == ".svg" else None)  # fmt: skip
        files.append(path)
    return files


def _panels(rows: Sequence[Row], width: float, height: float, **more: Any) -> tuple[Any, Any, Any]:
    """A figure with one panel for each task and noise rate."""
    import matplotlib.pyplot as plt

    keys = list(dict.fromkeys((row.task, row.noise) for row in rows))
    columns = min(3, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width * columns, height * lines), squeeze=False,
        layout="constrained", **more,
    )  # fmt: skip
    for spare in axes.flat[len(keys) :]:
        spare.set_visible(False)
    return figure, list(axes.flat), keys


def _title(task: str, noise: int | None) -> str:
    return task.upper() if noise is None else f"{task.upper()}, {noise} % noise"


def _whiskers(row: Row) -> list[list[float]]:
    low, high = row.interval
    return [[max(row.mean - low, 0.0)], [max(high - row.mean, 0.0)]]


def _dots(rows: Sequence[Row]) -> Any:
    """One dot a row with its interval; a cross where the paper has a number."""
    names = len({row.name for row in rows})
    figure, axes, keys = _panels(rows, 4.2, 0.9 + 0.27 * names)
    crosses = False
    for axis, key in zip(axes, keys, strict=False):
        shown = [row for row in rows if (row.task, row.noise) == key]
        for height, row in enumerate(reversed(shown)):
            colour = _COLOURS[0] if "RobustFT" not in row.name else _COLOURS[1]
            axis.errorbar(
                row.mean, height, xerr=_whiskers(row), fmt="o", color=colour, ms=4, lw=1.2
            )
            if row.paper is not None:
                crosses = True
                axis.plot(row.paper, height, "x", color=_PAPER, ms=5)
        axis.set_yticks(range(len(shown)), [row.name for row in reversed(shown)])
        axis.set_ylim(-0.6, len(shown) - 0.4)
        axis.grid(axis="x", lw=0.4, alpha=0.6)
        axis.set_title(_title(*key), fontsize=9)
        axis.set_xlabel("accuracy (%), 95 % interval" + ("; x: the paper's" if crosses else ""))
    return figure


def _against_noise(rows: Sequence[Row]) -> Any:
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row.task for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    noises = sorted({row.noise for row in rows if row.noise is not None})
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4.6 * len(tasks), 3.4), squeeze=False, layout="constrained"
    )
    for axis, task in zip(axes.flat, tasks, strict=True):
        for index, name in enumerate(names):
            mine = sorted(
                (r for r in rows if r.task == task and r.name == name), key=lambda r: r.noise or 0
            )
            if not mine:
                continue
            places = _beside([row.noise or 0 for row in mine], index, len(names))
            colour = _COLOURS[index % len(_COLOURS)]
            errors = np.hstack([np.array(_whiskers(row)) for row in mine])
            means = [row.mean for row in mine]
            axis.errorbar(places, means, yerr=errors, fmt="o-", color=colour, ms=4, lw=1.4,
                          capsize=2, label=name)  # fmt: skip
            printed = [
                (place, row.paper)
                for place, row in zip(places, mine, strict=True)
                if row.paper is not None
            ]
            if printed:
                axis.plot(*zip(*printed, strict=True), "x--", color=colour, ms=5, lw=0.8,
                          alpha=0.6, label=f"{name}, the paper's (Llama-3.1-8B)")  # fmt: skip
        axis.set_xlabel("noise in the training answers (%)")
        axis.set_ylabel("test accuracy (%), 95 % interval")
        axis.set_xticks(noises)
        axis.set_title(task.upper(), fontsize=9)
        axis.grid(lw=0.4, alpha=0.6)
    _legend_below(figure, axes.flat[0])
    return figure


def _beside(places: Sequence[float], index: int, count: int) -> list[float]:
    """Where line `index` of `count` has its points, so that the whiskers stand side by side."""
    shift = 0.015 * (max(places) - min(places) or 1) * (index - (count - 1) / 2)
    return [place + shift for place in places]


def _legend_below(figure: Any, axis: Any) -> None:
    """One legend for all panels, under them, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7, frameon=False)


def _sensitivity(rows: Sequence[Row]) -> Any:
    """Two panels: accuracy against beta and against k, one line a method, task and noise rate."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("beta", "k"), strict=True):
        lines: dict[str, list[tuple[float, Row]]] = {}
        for row in rows:
            method, _, setting = row.name.partition(": ")
            parameter, _, value = setting.partition(" = ")
            if parameter == name:
                label = f"{method}, {_title(row.task, row.noise)}"
                lines.setdefault(label, []).append((float(value.rstrip("%")), row))
        for index, (label, points) in enumerate(lines.items()):
            places = _beside([place for place, _ in points], index, len(lines))
            errors = np.hstack([np.array(_whiskers(row)) for _, row in points])
            axis.errorbar(places, [row.mean for _, row in points], yerr=errors, fmt="o-", ms=4,
                          lw=1.3, capsize=2, color=_COLOURS[index % len(_COLOURS)],
                          label=label)  # fmt: skip
        axis.set_xlabel("β: share of denoised records kept (%)" if name == "beta"
                        else "k: clean neighbours in the context")  # fmt: skip
        axis.grid(lw=0.4, alpha=0.6)
    axes[0].set_ylabel("test accuracy (%), 95 % interval")
    _legend_below(figure, axes[0])
    return figure


def _perplexity(rows: Sequence[Row]) -> Any:
    """Distributions of the test answers' perplexity, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes, keys = _panels(rows, 3.8, 3.0, sharex=True)
    values = np.concatenate([o.perplexities for row in rows for o in row.outcomes])
    values = values[np.isfinite(values)]
    edges = np.geomspace(max(values.min(), 1.0), max(values.max(), 1.1), 33)
    for axis, key in zip(axes, keys, strict=False):
        shown = [row for row in rows if (row.task, row.noise) == key]
        for index, row in enumerate(shown):
            found = np.concatenate([outcome.perplexities for outcome in row.outcomes])
            weights = np.full(len(found), 100.0 / len(found))
            colour = _COLOURS[index % len(_COLOURS)]
            axis.hist(np.clip(found, edges[0], edges[-1]), edges, weights=weights, color=colour,
                      histtype="step", lw=1.4,
                      label=f"{row.name} (median {np.median(found):.2f})")  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] < 100 else (1,)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(_title(*key), fontsize=9)
        axis.set_xlabel("perplexity of the right answer (log scale)")
        axis.set_ylabel("test records (%)")
        axis.legend(fontsize=7, frameon=False)
    return figure


def _radar(rows: Sequence[Row]) -> Any:
    """Accuracy by category, one polygon a method."""
    figure, axes, keys = _panels(rows, 5.4, 5.0, subplot_kw={"projection": "polar"})
    for axis, key in zip(axes, keys, strict=False):
        shown = [row for row in rows if (row.task, row.noise) == key]
        parts = [{part.category: part for part in row.by_category()} for row in shown]
        names = list(parts[0])
        angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
        for index, (row, found) in enumerate(zip(shown, parts, strict=True)):
            heights = [found[name].mean if name in found else math.nan for name in names]
            # Thinner and thinner: lines that coincide are all seen.
            axis.plot([*angles, angles[0]], [*heights, heights[0]], "o-", ms=2.5,
                      lw=1.0 + 1.5 * (len(shown) - 1 - index),
                      color=_COLOURS[index % len(_COLOURS)], label=row.name)  # fmt: skip
        labels = [f"{name}\n({parts[0][name].test_records})" for name in names]
        axis.set_xticks(angles, labels, fontsize=7)
        axis.tick_params(axis="x", pad=8)
        axis.set_ylim(bottom=0)
        axis.set_rlabel_position(180 / len(names))
        axis.tick_params(axis="y", labelsize=6)
        axis.set_title(
            f"{_title(*key)}: accuracy (%) by category (test records)", fontsize=9, pad=18
        )
        axis.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(-0.15, -0.15))
    return figure


def _stability(rows: Sequence[Row]) -> Any:
    """Bars of the mean over instructions, whiskers of one standard deviation, dots of each."""
    names = len({row.name for row in rows})
    figure, axes, keys = _panels(rows, 1.2 + 0.9 * names, 3.2, sharey=True)
    for axis, key in zip(axes, keys, strict=False):
        shown = [row for row in rows if (row.task, row.noise) == key]
        for place, row in enumerate(shown):
            colour = _COLOURS[place % len(_COLOURS)]
            axis.bar(place, row.mean, width=0.6, color=colour, alpha=0.35)
            axis.errorbar(place, row.mean, yerr=row.deviation, color=colour, capsize=3)
            spread = np.linspace(-0.15, 0.15, len(row.values))
            axis.plot(place + spread, row.values, ".", color=colour, ms=4)
        axis.set_xticks(range(len(shown)), [row.name for row in shown], rotation=20, ha="right")
        axis.set_title(_title(*key), fontsize=9)
        axis.grid(axis="y", lw=0.4, alpha=0.6)
    axes[0].set_ylabel("accuracy (%), mean ± deviation", fontsize=8)
    return figure
