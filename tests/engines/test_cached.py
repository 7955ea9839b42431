"""What an engine behind a cache tells of itself."""

from __future__ import annotations

from pathlib import Path

from robustft.cache import Cache
from robustft.config import EngineConfig
from robustft.engines import Message, Prompt
from robustft.engines.cached import CachedEngine
from robustft.engines.factory import load_engine

LONG = [Prompt((Message("user", letter * 5000),)) for letter in "ab"]


def test_prompts_cut_by_the_engine_behind_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    config = EngineConfig(model=str(tiny_model), dtype="float32", device="cpu")
    cache = Cache(tmp_path / "answers.sqlite")
    cached = CachedEngine(cache, lambda: load_engine(config), model_id="tiny")
    assert cached.truncated == 0
    cached.generate(LONG[:1], 4)
    first = cached.truncated
    assert first > 0
    cached.release()
    assert cached.truncated == first
    cached.generate(LONG[:1], 4)  # known
    assert cached.truncated == first
    cached.generate(LONG, 4)
    assert cached.truncated == 2 * first
