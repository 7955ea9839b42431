"""Sizes that fit the model: the paper's settings, and smaller ones for the embedded small model.

The small model's were chosen by what fits two CPU cores: one configuration (3 epochs) was tried
on held-back training records of Financial PhraseBank, then cut to 2 epochs. No test set was used.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from robustft.config import ReproduceConfig
from robustft.models import find_model


@dataclass(frozen=True, slots=True)
class Preset:
    """How the experts are asked and how adapters are trained."""

    rounds: int = 2
    reasoning_tokens: int = 256
    epochs: int = 2
    learning_rate: float = 1e-4
    batch_size: int = 8
    top_layers: int | None = None
    dtype: str = "auto"
    attention: str | None = None  # transformers' own choice; eager is faster on short sequences


PAPER = Preset()
SMALL = Preset(
    rounds=1, reasoning_tokens=16, epochs=2, learning_rate=2e-3, batch_size=8, top_layers=4,
    dtype="bfloat16", attention="eager",
)  # fmt: skip
TABLE2_MODELS = (
    "meta-llama/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
    "google/gemma-2-9b-it",
)


def preset_for(config: ReproduceConfig, model: str | None) -> Preset:
    """The preset of `model`, with what `config` names put in its place."""
    small = model is None or find_model(model).embedded
    chosen = SMALL if small else PAPER
    named = {
        field.name: value
        for field in dataclasses.fields(Preset)
        if (value := getattr(config, field.name, None)) is not None
    }
    if config.engine.dtype != "auto":
        named["dtype"] = config.engine.dtype
    if config.engine.attention is not None:
        named["attention"] = config.engine.attention
    return dataclasses.replace(chosen, **named)
