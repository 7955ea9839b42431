"""`train --report-to`: what the trackers get."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import call, quiz, write

from robustft.errors import UserError
from robustft.training import trackers
from robustft.training.signals import StepSignals
from robustft_kernels import token_stats

STEP = {"loss", "learning_rate", "epoch", "token_entropy", "response_nll", "noise_score"}


class Notebook:
    """A tracker in accelerate's form that keeps what it gets, and talks."""

    requires_logging_directory = False
    opened: list[Notebook] = []  # noqa: RUF012

    def __init__(self, project: str, **options: Any) -> None:
        self.project, self.options = project, options
        self.settings: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = False
        Notebook.opened.append(self)

    def start(self) -> None:
        print("a word from the tracker")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int) -> None:
        print("another word")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Notebook)
    monkeypatch.setattr(trackers, "require", lambda names: None)
    monkeypatch.setattr(Notebook, "opened", [])
    return Notebook


def trained(capsys: Any, tmp_path: Path, model: Path, *options: str) -> Any:
    source = write(tmp_path / "in.jsonl", quiz(20))
    return call(
        capsys, "train", source, "--out", tmp_path / "adapter", "--model", model, "--device", "cpu",
        "--epochs", "2", "--batch-size", "8", *options,
    )  # fmt: skip


def test_every_step_reaches_the_tracker_and_nothing_else_reaches_stdout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, notebook: type[Notebook]
) -> None:
    done = trained(capsys, tmp_path, tiny_model, "--report-to", "wandb")
    assert done.status == 0, done.err
    (run,) = notebook.opened
    assert [step for step, _ in run.rows] == [1, 2, 3, 4, 5, 6]
    assert all(set(values) == STEP for _, values in run.rows)
    assert all(math.isfinite(value) for _, values in run.rows for value in values.values())
    assert run.rows[-1][1]["epoch"] == 2
    assert run.project == "robustft"
    assert run.settings["learning_rate"] == 1e-4
    assert run.finished
    assert "word" not in done.out
    # The loss is the mean nll of the step's response tokens.
    for _, values in run.rows:
        assert values["response_nll"] == pytest.approx(values["loss"], rel=1e-4)


def test_without_a_tracker_nothing_is_computed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, notebook: type[Notebook]
) -> None:
    assert trained(capsys, tmp_path, tiny_model).status == 0
    assert notebook.opened == []


def test_reporting_changes_no_weight(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, notebook: type[Notebook]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    trained(capsys, tmp_path / "a", tiny_model)
    trained(capsys, tmp_path / "b", tiny_model, "--report-to", "wandb")
    weights = [tmp_path / run / "adapter/adapter_model.safetensors" for run in "ab"]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_absent_package_is_one_clear_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    done = trained(capsys, tmp_path, tiny_model, "--report-to", "wandb")
    assert done.status == 2
    assert "pip install wandb" in done.complaint
    assert not (tmp_path / "adapter").exists()


def test_an_unknown_tracker_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    done = trained(capsys, tmp_path, tiny_model, "--report-to", "nobody")
    assert done.status == 2
    assert "tensorboard, trackio, wandb" in done.complaint


def test_installed_trackers_are_accepted() -> None:
    trackers.require([])
    with pytest.raises(UserError, match="no_such_package_here"):
        trackers.require(["no_such_package_here"])


def test_signals_against_plain_sums() -> None:
    torch.manual_seed(0)
    signals = StepSignals()
    assert signals.take() == {}
    lengths, entropies, nlls, noise = [3, 1, 6], [], [], []
    for chunk in (lengths[:2], lengths[2:]):
        logits = torch.randn(sum(chunk), 11, dtype=torch.float64) * 3
        targets = torch.randint(11, (sum(chunk),))
        edges = torch.tensor([0, *torch.tensor(chunk).cumsum(0).tolist()])
        signals.add(token_stats(logits, targets, cu_seqlens=edges))
        log_p = logits.log_softmax(-1)
        nll = -log_p.gather(-1, targets[:, None])[:, 0]
        entropies += (-(log_p.exp() * log_p).sum(-1)).tolist()
        nlls += nll.tolist()
        noise += [1 - math.exp(-float(part.mean())) for part in nll.split(chunk)]
    assert signals.take() == pytest.approx(
        {
            "token_entropy": sum(entropies) / len(entropies),
            "response_nll": sum(nlls) / len(nlls),
            "noise_score": sum(noise) / len(noise),
        }
    )
    assert signals.take() == {}
