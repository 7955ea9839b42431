"""Progress with ETA on stderr, silent for anything that is over in two seconds."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

_SILENT_SECONDS = 2.0
_SECONDS_BETWEEN_LINES = 15.0  # where stderr is no terminal, or one of no width
# Of all that count or draw, in any thread: tqdm keeps its own lock for good where an interrupt
# falls into its drawing.
_DRAWING = threading.RLock()


class Progress:
    """One bar over a total, in units of estimated work; `desc` says what is being done now.

    Where nobody knows the total (None) it counts.

    A terminal of some width shows a moving bar, anything else a line now and then. `done` is what
    an earlier run has done already; the estimate of what is left ignores it.
    """

    def __init__(
        self,
        desc: str,
        total: float | None,
        *,
        done: float = 0,
        unit: str | None = None,
        quiet: bool = False,
    ) -> None:
        self._desc = desc
        self._done, self._total, self._before = done, total, done
        self._start = self._shown = time.monotonic()
        terminal = _has_room()
        self._lines = not terminal and not quiet
        self._bar: Any = _bar(desc, total, done, unit) if terminal and not quiet else None
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def update(self, amount: float, doing: str | None = None) -> None:
        """Advance by `amount`, from any thread; `doing` names the step at work."""
        with _DRAWING:
            self._done += amount
            now = time.monotonic()
            due = self._lines and now - self._shown >= _SECONDS_BETWEEN_LINES
            if self._bar is not None:
                self._bar.set_postfix_str(doing or "", refresh=False)
                self._bar.update(amount)
            elif due and self._done > self._before:
                self._shown = now
                desc = self._desc if doing is None else f"{self._desc} · {doing}"
                said = self._said(now - self._start)
                print(f"robustft: {desc}: {said}", file=sys.stderr, flush=True)

    def _said(self, elapsed: float) -> str:
        if self._total is None:
            return f"{self._done:,.0f}, {_clock(elapsed)} elapsed"
        left = elapsed * max(self._total - self._done, 0) / (self._done - self._before)
        share = min(self._done / max(self._total, 1e-9), 1)
        return f"{share:.0%}, {_clock(elapsed)} elapsed, {_clock(left)} left"

    def skip(self, amount: float) -> None:
        """Advance by what an earlier run has done; the estimate of what is left ignores it."""
        with _DRAWING:
            self._done += amount
            self._before += amount
            if self._bar is not None:
                self._bar.initial += amount
                self._bar.update(amount)

    def _tick(self) -> None:
        """Show the bar before anything is done, and that time goes by."""
        while not self._over.wait(_SILENT_SECONDS):
            with _DRAWING:
                self._bar.delay = 0.0
                self._bar.refresh(nolock=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._ticker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._over.set()
            self._ticker.join()
            self._bar.close()


class Stages(contextlib.ExitStack):
    """Progress through stages that name themselves: `stages("neighbours", done, total)`.

    A stage is over when the next one begins, with its total or without.
    """

    def __init__(self, desc: str) -> None:
        super().__init__()
        self._desc, self._stage, self._done = desc, "", 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of `stage` are over."""
        if stage != self._stage:
            self.close()
            self._shown = self.enter_context(Progress(f"{self._desc} · {stage}", total))
            self._stage, self._done = stage, 0
        self._shown.update(done - self._done)
        self._done = done


def _has_room() -> bool:
    """Whether stderr is a terminal that says how wide it is; tqdm draws nothing where one does not.

    Those of containers and of jobs often say 0.
    """
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # no descriptor behind it
        return False


def _bar(desc: str, total: float | None, done: float, unit: str | None) -> Any:
    from tqdm import tqdm

    count = ", {n:.0f}/{total:.0f} " + unit if unit else ""
    # A narrow terminal cuts the end: the bar first, the time that is left last.
    known = (
        "{percentage:3.0f}% [{remaining} left, {elapsed} elapsed" + count + "{postfix}] |{bar:20}|"
    )
    counted = "{n:.0f} [{elapsed} elapsed{postfix}]"
    return tqdm(
        total=total,
        initial=done,
        desc=desc,
        file=sys.stderr,
        delay=_SILENT_SECONDS,
        mininterval=0.2,
        dynamic_ncols=True,
        bar_format="{desc}: " + (counted if total is None else known),
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
