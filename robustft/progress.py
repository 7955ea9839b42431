"""Progress with ETA on stderr, silent for anything that is over in two seconds."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self


class Progress:
    """One bar of known total, in units of estimated work; `desc` says what is being done now.

    `done` is what an earlier run has done already; the estimate of what is left ignores it.
    """

    def __init__(
        self, desc: str, total: float, *, done: float = 0, unit: str | None = None
    ) -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        count = "{n:.0f}/{total:.0f} " + unit + " " if unit else ""
        self._bar: Any = tqdm(
            total=total,
            initial=done,
            desc=desc,
            file=sys.stderr,
            delay=2.0,
            mininterval=0.2 if terminal else 15.0,
            leave=terminal,
            dynamic_ncols=terminal,
            bar_format="{desc}: {percentage:3.0f}% |{bar:20}| "
            + count
            + "[{elapsed} elapsed, {remaining} left]",
        )
        self._desc = desc

    def update(self, amount: float, doing: str | None = None) -> None:
        """Advance by `amount`; `doing` names the step at work."""
        if doing is not None:
            self._bar.set_description_str(f"{self._desc} · {doing}", refresh=False)
        self._bar.update(amount)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
