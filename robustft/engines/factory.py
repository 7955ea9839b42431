"""The engine that a configuration names, loaded only when it is asked for."""

from __future__ import annotations

from pathlib import Path

from robustft.config import EngineConfig
from robustft.engines import Engine


def load_engine(config: EngineConfig, adapter: Path | None = None) -> Engine:
    """Load the engine of `config`, with a LoRA adapter on top where one is given.

    Raises:
        UserError: the model, the adapter or the server cannot be used, in one line.
    """
    from robustft.engines.transformers import TransformersEngine

    if adapter is None:
        return TransformersEngine(config)
    from robustft.devices import pick_device, pick_dtype
    from robustft.frozen import FrozenTrunk
    from robustft.models import find_model, load_causal_lm, load_tokenizer
    from robustft.training import load_adapter

    source = find_model(config.model)
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    model = load_adapter(load_causal_lm(source, dtype=dtype, attention=config.attention), adapter)
    engine = TransformersEngine(config, model=model, tokenizer=load_tokenizer(source))
    engine.model_id = source.name
    engine.trunk = FrozenTrunk.of(engine.model)
    return engine
