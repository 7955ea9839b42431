from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from robustft.cli.options import build_parser
from robustft.config import EngineConfig
from robustft.next_steps import to_evaluate, to_train_and_evaluate

URL = "http://localhost:11434/v1"


@pytest.mark.parametrize(
    ("engine", "model"),
    [
        (EngineConfig(), None),
        (EngineConfig("org/Name"), "org/Name"),
        (EngineConfig("qwen3:8b", "openai", base_url=URL), "qwen3:8b"),
        # The server's name would mean nothing to `train`.
        (EngineConfig("qwen3:8b", "openai", base_url=URL, tokenizer="org/Name"), "org/Name"),
    ],
)
@pytest.mark.parametrize("schema", [None, "qa:Prompt,Label"])
def test_what_was_named_is_named_again(
    engine: EngineConfig, model: str | None, schema: str | None
) -> None:
    out = Path("my runs")
    commands = to_train_and_evaluate(out / "cleaned.csv", out, engine, schema)
    train, evaluate = (build_parser().parse_args(shlex.split(text)[1:]) for text in commands)
    assert (train.command, train.input) == ("train", "my runs/cleaned.csv")
    assert (train.model, train.schema) == (evaluate.model, evaluate.schema) == (model, schema)
    assert train.out == evaluate.adapter == "my runs/adapter"
    assert commands[1] == to_evaluate(out / "adapter", model, schema)
