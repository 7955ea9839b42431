"""The engine that a configuration names, loaded only when it is asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from robustft.config import EngineConfig
from robustft.engines import Engine
from robustft.errors import UserError


def load_engine(config: EngineConfig, adapter: Path | None = None) -> Engine:
    """Load the engine of `config`, with a LoRA adapter on top where one is given.

    Raises:
        UserError: the model, the adapter or the server cannot be used, in one line.
    """
    if config.engine == "openai":
        if adapter is not None:
            raise UserError(
                "--adapter: a server loads its adapters itself; name the adapter there as --model"
            )
        _need("httpx2", "pydantic", "tenacity", engine="openai", extra="server")
        from robustft.engines.probing import connect

        return connect(config)
    if config.engine == "vllm":
        _need("vllm", engine="vllm")
        from robustft.engines.vllm import VllmEngine

        return VllmEngine(config, adapter)
    from robustft.engines.transformers import TransformersEngine

    if adapter is None:
        return TransformersEngine(config)
    from robustft.devices import pick_device, pick_dtype
    from robustft.frozen import FrozenTrunk
    from robustft.models import content_digest, find_model, load_causal_lm, load_tokenizer
    from robustft.training import load_adapter

    source = find_model(config.model)
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    model = load_causal_lm(source, dtype=dtype, attention=config.attention)
    model = load_adapter(model, adapter, source.name)
    engine = TransformersEngine(config, model=model, tokenizer=load_tokenizer(source))
    engine.model_id = source.name
    if engine.revision == "local":
        engine.revision = content_digest(source)
    engine.trunk = FrozenTrunk.of(engine.model)
    return engine


def _need(*packages: str, engine: str, extra: str | None = None) -> None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        what = f"'robustft[{extra}]'" if extra else absent[0]
        raise UserError(
            f"--engine {engine} needs {absent[0]}, which is not installed: run `pip install {what}`"
        )
