"""`robustft.clean`, the call from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted import LetterEmbedder, ScriptedEngine

import robustft as rft
from robustft.errors import UserError

ROWS = [{"question": f"Q{i}?", "options": ["x", "y"], "answer": "A"} for i in range(6)]


def clean(out: Path, **settings: Any) -> rft.CleanResult:
    models = {"engine": ScriptedEngine(), "embedder": LetterEmbedder()}
    return rft.clean(ROWS, out=out, **models | settings)


def test_settings_of_the_experts_are_settings(tmp_path: Path) -> None:
    clean(tmp_path, rounds=3, reasoning_tokens=50)
    config = json.loads((tmp_path / "manifest.json").read_text())["config"]
    assert (config["experts.rounds"], config["experts.reasoning_tokens"]) == (3, 50)


def test_an_engine_is_one_or_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match="engine must be an EngineConfig or an Engine, got 'openai'"
    ):
        clean(tmp_path, engine="openai")
    with pytest.raises(UserError, match="model or engine, not both"):
        clean(tmp_path, engine=rft.EngineConfig(model="a"), model="b")
    with pytest.raises(UserError, match="no/such/folder"):
        clean(tmp_path, engine=rft.EngineConfig(model=str(tmp_path / "no/such/folder")))


def test_an_unknown_setting_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no setting 'betta'; did you mean 'beta'\?"):
        clean(tmp_path, betta=0.5)
    with pytest.raises(UserError, match=r"no setting 'round'; did you mean 'rounds'\?"):
        clean(tmp_path, round=1)


def test_the_public_names_are_all_there_is() -> None:
    assert dir(rft) == sorted(rft.__all__)
    assert all(getattr(rft, name) is not None for name in rft.__all__)
