"""`train --report-to`: the curves of a run in TensorBoard, trackio or Weights & Biases.

accelerate's trackers do the work; this module chooses them and keeps their words off stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from robustft.errors import UserError

__all__ = ["Report", "opened", "require"]

_PROJECT = "robustft"


class Report:
    """Where the numbers of each step go."""

    def __init__(self, trackers: Sequence[Any]) -> None:
        self._trackers = list(trackers)

    def __bool__(self) -> bool:
        """Whether anybody listens."""
        return bool(self._trackers)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the values of one step (from 1) to every tracker."""
        with contextlib.redirect_stdout(sys.stderr):
            for tracker in self._trackers:
                tracker.log(dict(values), step=step)


def require(names: Sequence[str]) -> None:
    """Raise UserError where the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--report-to {name}: the package is not installed; run `pip install {name}`"
            )


@contextlib.contextmanager
def opened(
    names: Sequence[str], out: Path, settings: Mapping[str, Any], *, resumed: bool
) -> Iterator[Report]:
    """Trackers of one run, closed at the end; TensorBoard's files go to `out`/tensorboard.

    trackio and wandb keep the run under the project "robustft", named after the folder and its
    parent; a resumed run goes on where it can.
    """
    if not names:
        yield Report([])
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers log through it
    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in settings.items()
    }
    trackers: list[Any] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # trackio prints to stdout
        for name in dict.fromkeys(names):
            make = LOGGER_TYPE_TO_CLASS[name]
            if make.requires_logging_directory:
                tracker = make(name, out)
            else:
                run = "-".join(out.resolve().parts[-2:])
                tracker = make(_PROJECT, name=run, resume="allow" if resumed else "never")
            tracker.start()
            # trackio finishes its current run at exit, once more and on stdout, unless told first.
            module = importlib.import_module(name) if name == "trackio" else tracker
            stack.callback(module.finish)
            tracker.store_init_configuration(plain)
            trackers.append(tracker)
        yield Report(trackers)
