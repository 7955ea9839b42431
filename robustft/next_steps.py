"""The commands worth running after another one, as they are typed."""

from __future__ import annotations

import shlex
from pathlib import Path

from robustft.config import EngineConfig


def to_clean(noisy: Path, out: Path, schema: str | None, truth: Path) -> str:
    """After `corrupt`: see how many of the answers that were made wrong are found."""
    named = _named(None, schema)
    clean = ["robustft", "clean", str(noisy), *named, "--out", str(out), "--truth", str(truth)]
    return shlex.join(clean)


def to_train_and_evaluate(
    cleaned: Path, out: Path, engine: EngineConfig, schema: str | None
) -> tuple[str, str]:
    """After `clean`: fine-tune on what it has left, and see what that is worth."""
    # Servers name their models as they like: weights are where the tokenizer was found.
    model, adapter = engine.tokenizer or engine.model, out / "adapter"
    train = ["robustft", "train", str(cleaned), *_named(model, schema), "--out", str(adapter)]
    return shlex.join(train), to_evaluate(adapter, model, schema)


def to_evaluate(adapter: Path, model: str | None, schema: str | None) -> str:
    """After `train`; no `model`: the embedded one."""
    named = _named(model, schema)
    return shlex.join(["robustft", "eval", "TEST_FILE", *named, "--adapter", str(adapter)])


def _named(model: str | None, schema: str | None) -> list[str]:
    named = ["--model", model] if model else []
    return [*named, "--schema", schema] if schema else named
