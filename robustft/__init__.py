"""RobustFT (arXiv 2412.14922): clean noisy supervised fine-tuning data, then train on it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustft.cleaning import clean
    from robustft.config import CleanConfig, EngineConfig, ExpertConfig
    from robustft.retrieval import CosineKNN
    from robustft.verdicts import CleanResult
    from robustft_kernels import Consistency, TokenStats
    from robustft_kernels.answer_consistency import answer_consistency
    from robustft_kernels.linear_token_stats import linear_token_stats
    from robustft_kernels.token_stats import token_stats

__version__ = "0.1.0"

# Public name -> module that defines it, imported on first use: `import robustft` stays light.
_LAZY = {
    "CleanConfig": "robustft.config",
    "CleanResult": "robustft.verdicts",
    "Consistency": "robustft_kernels",
    "CosineKNN": "robustft.retrieval",
    "EngineConfig": "robustft.config",
    "ExpertConfig": "robustft.config",
    "TokenStats": "robustft_kernels",
    "answer_consistency": "robustft_kernels",
    "clean": "robustft.cleaning",
    "linear_token_stats": "robustft_kernels",
    "token_stats": "robustft_kernels",
}

__all__ = [
    "CleanConfig",
    "CleanResult",
    "Consistency",
    "CosineKNN",
    "EngineConfig",
    "ExpertConfig",
    "TokenStats",
    "__version__",
    "answer_consistency",
    "clean",
    "linear_token_stats",
    "token_stats",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
