"""`train --report-to` with the trackers themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import quiz, write

pytestmark = pytest.mark.integration


def train(folder: Path, model: Path, tracker: str) -> subprocess.CompletedProcess[str]:
    write(folder / "in.jsonl", quiz(20))
    command = [sys.executable, "-m", "robustft", "train", "in.jsonl", "--out", "adapter"]
    options = ["--model", str(model), "--device", "cpu", "--epochs", "1", "--report-to", tracker]
    return subprocess.run(
        [*command, *options], cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | {"TRACKIO_DIR": str(folder / "trackio"), "NO_COLOR": "1"},
    )  # fmt: skip


def test_tensorboard(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = train(tmp_path, tiny_model, "tensorboard")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "adapter/tensorboard"))
    events.Reload()
    for name in ("loss", "token_entropy", "noise_score"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3]


def test_trackio(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("trackio")
    done = train(tmp_path, tiny_model, "trackio")
    assert done.returncode == 0, done.stderr
    assert "trackio" not in done.stdout.lower()
    assert list((tmp_path / "trackio").glob("robustft*.db"))
