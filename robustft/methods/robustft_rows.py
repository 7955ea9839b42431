"""RobustFT: by the paper's detector to the letter, and by this package's default one."""

from __future__ import annotations

import dataclasses

from robustft.cleaning import run_clean
from robustft.methods.base import Method, Setting
from robustft.verdicts import CleanResult


def prepare(setting: Setting) -> CleanResult:
    """Detect, relabel and select with the detector that the configuration names."""
    return run_clean(setting.config, engine=setting.engine, embedder=setting.embedder)


def prepare_by_paper(setting: Setting) -> CleanResult:
    """Detect, relabel and select by the paper's rule."""
    return prepare(
        dataclasses.replace(setting, config=dataclasses.replace(setting.config, detector="paper"))
    )


PAPER = Method("robustft-paper", "RobustFT (paper)", "RobustFT, the paper's detector",
               prepare_by_paper)  # fmt: skip
DEFAULT = Method("robustft", "RobustFT (ours)", "RobustFT, this package's default detector",
                 prepare)  # fmt: skip
