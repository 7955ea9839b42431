"""What a method is, and what it works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from robustft.config import CleanConfig
from robustft.embedding import TextEmbedder
from robustft.engines import Engine
from robustft.verdicts import CleanResult


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method works with: the noisy set and where to write (`config`), and who answers."""

    config: CleanConfig
    engine: Engine
    embedder: TextEmbedder


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the paper's tables: a training set to make, or a way to ask without training."""

    name: str
    title: str  # as the paper's tables have it
    about: str
    prepare: Callable[[Setting], CleanResult] | None = None  # writes the training set
    trains: bool = True  # LoRA on what `prepare` wrote, or else on the noisy set itself
    model: str | None = None  # asked as it is, instead of the model at hand
    demonstrations: int = 0  # nearest noisy training examples shown at test time
