"""One frozen dataclass per stage; what the command line and a config file fill in."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from robustft.errors import UserError

ABLATIONS = ("selection", "checker", "reviewer", "cer", "rel")
ENGINES = ("transformers",)
DETECTORS = ("paper",)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _require(condition: bool, name: str, requirement: str, value: object) -> None:
    if not condition:
        raise UserError(f"{name} must be {requirement}, got {value!r}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Which model answers, and how it is run."""

    model: str | None = None  # hub id, folder or .gguf file; None: the embedded small model
    engine: str = "transformers"
    device: str = "auto"
    dtype: str = "auto"
    attention: str | None = None  # transformers' attn_implementation; None: its own choice
    batch_tokens: int | None = None  # tokens in one batch, prompt and reply; None: by the device
    temperature: float = 0.0  # 0: greedy

    def __post_init__(self) -> None:
        _require(self.engine in ENGINES, "engine", f"one of {', '.join(ENGINES)}", self.engine)
        _require(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        _require(self.temperature >= 0, "temperature", "at least 0", self.temperature)
        tokens = self.batch_tokens
        _require(tokens is None or tokens >= 1, "batch_tokens", "at least 1", tokens)


@dataclass(frozen=True, slots=True)
class ExpertConfig:
    """How the experts are asked (paper, eq. 1, 2, 5, 6)."""

    rounds: int = 2  # alternations of reasoning and reflection (eq. 2)
    reasoning_tokens: int = 64  # at most, for each reasoning and each reflection
    answer_tokens: int = 128  # at most, for one free-text answer
    choice: Literal["likelihood", "generate"] = "likelihood"  # how a lettered answer is read
    calibrate: bool = False  # divide the letters' content-free probabilities out (Zhao et al. 2021)

    def __post_init__(self) -> None:
        _require(self.rounds >= 1, "rounds", "at least 1", self.rounds)
        _require(
            self.reasoning_tokens >= 1, "reasoning_tokens", "at least 1", self.reasoning_tokens
        )
        _require(self.answer_tokens >= 1, "answer_tokens", "at least 1", self.answer_tokens)
        modes = ("likelihood", "generate")
        _require(self.choice in modes, "choice", f"one of {', '.join(modes)}", self.choice)


@dataclass(frozen=True, slots=True)
class CleanConfig:
    """The main job: detect, relabel, select."""

    input: str
    out: Path
    schema: str | None = None
    split: str = "train"
    limit: int | None = None
    seed: int = 0
    detector: str = "paper"
    k: int = 3  # clean neighbours in the context (eq. 4)
    beta: float = 0.5  # share of the denoised records kept (eq. 8)
    without: frozenset[str] = frozenset()  # ablations of the paper's table 3
    embedder: str | None = None  # sentence-embedding model; None: the embedded MiniLM
    threads: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    experts: ExpertConfig = field(default_factory=ExpertConfig)

    def __post_init__(self) -> None:
        _require(self.k >= 1, "k", "at least 1", self.k)
        in_range = math.isfinite(self.beta) and 0 <= self.beta <= 1
        _require(in_range, "beta", "in [0, 1]", self.beta)
        _require(self.limit is None or self.limit >= 1, "limit", "at least 1", self.limit)
        known = f"one of {', '.join(DETECTORS)}"
        _require(self.detector in DETECTORS, "detector", known, self.detector)
        for name in self.without:
            _require(name in ABLATIONS, "without", f"one of {', '.join(ABLATIONS)}", name)

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the run it resumes, as flat JSON values."""
        flat: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self).items():
            if name in {"out", "threads"}:
                continue
            if isinstance(value, dict):
                flat.update({f"{name}.{inner}": item for inner, item in value.items()})
            elif isinstance(value, frozenset):
                flat[name] = sorted(value)
            else:
                flat[name] = value
        return flat
