"""Training the tiny model: its configuration, and its loop step by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from robustft.config import EngineConfig, TrainConfig
from robustft.models import find_model, load_causal_lm, load_tokenizer
from robustft.records import open_records
from robustft.training.adapter import attach_adapter
from robustft.training.data import encode_records
from robustft.training.loop import TrainingLoop

WEIGHTS = "adapter_model.safetensors"
torch.set_num_threads(1)  # the tiny model gains nothing from more


def config_for(corpus: Path, model: Path, out: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(
        input=str(corpus),
        out=out,
        batch_size=8,
        epochs=2,
        learning_rate=5e-3,
        engine=EngineConfig(model=str(model), device="cpu"),
    )
    return replace(base, **changes)


def loop_for(
    config: TrainConfig, checkpoint: Path, dtype: torch.dtype = torch.float32
) -> TrainingLoop:
    source = find_model(config.engine.model)
    data = encode_records(open_records(config.input), load_tokenizer(source), config.cutoff)
    model = attach_adapter(load_causal_lm(source, dtype=dtype), config, "tiny")
    return TrainingLoop(model, data, config, checkpoint)
