"""What the user can get wrong, and what is told of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trained import WEIGHTS, config_for, loop_for

from robustft.config import TrainConfig
from robustft.errors import UserError
from robustft.models import find_model, load_causal_lm
from robustft.training import train
from robustft.training.adapter import linear_names
from robustft.training.data import Example
from robustft.training.loop import TrainingLoop


def test_another_configuration_is_refused_with_the_difference(
    corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = config_for(corpus, tiny_model, tmp_path / "adapter", epochs=1)
    train(config)
    with pytest.raises(UserError, match="--epochs was 1, now 3; --rank was 8, now 4") as caught:
        train(replace(config, epochs=3, rank=4))
    assert "\n" not in str(caught.value)
    with corpus.open("a") as file:
        file.write('{"question": "q", "options": ["a", "b"], "answer": "A"}\n')
    with pytest.raises(UserError, match="the input is not the one that it began with"):
        train(config)


def test_a_run_that_saved_nothing_leaves_its_folder_free(
    corpus: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(corpus, tiny_model, tmp_path / "adapter", epochs=1, top_layers=3)
    with pytest.raises(UserError, match=r"top_layers must be in \[1, 2\]"):
        train(config)

    def full(self: TrainingLoop, examples: list[Example]) -> torch.Tensor:
        raise torch.OutOfMemoryError("no")

    config = replace(config, top_layers=2)
    with monkeypatch.context() as scarce:
        scarce.setattr(TrainingLoop, "response_loss", full)
        with pytest.raises(UserError, match="lower --cutoff, or adapt fewer layers with") as caught:
            train(config)
    assert "--out" not in str(caught.value)
    assert train(replace(config, cutoff=128, top_layers=1)).resumed == 0


@pytest.mark.parametrize("failure", ["nan", "memory"])
def test_the_advice_after_a_step_that_failed_can_be_followed(
    corpus: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: str,
) -> None:
    config = config_for(corpus, tiny_model, tmp_path / "a", epochs=1, checkpoint_seconds=0.0)
    real = TrainingLoop.response_loss

    def failing(self: TrainingLoop, examples: list[Example]) -> torch.Tensor:
        if self.history.step < 2:
            return real(self, examples)
        if failure == "nan":
            return real(self, examples) * float("nan")
        raise torch.OutOfMemoryError("no")

    says = {
        "nan": "the loss became nan at step 3; lower --learning-rate",
        "memory": "lower --cutoff, .* with another --out: this one holds the steps done so far",
    }
    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "response_loss", failing)
        with pytest.raises(UserError, match=says[failure]):
            train(config)
    if failure == "nan":
        assert train(replace(config, learning_rate=1e-3)).resumed == 0
    else:
        with pytest.raises(UserError, match="--cutoff was 2048, now 128; choose another --out"):
            train(replace(config, cutoff=128))
        assert train(replace(config, cutoff=128, out=tmp_path / "b")).resumed == 0
        assert train(config).resumed == 2  # where there is more memory


def test_a_foreign_adapter_is_not_overwritten(
    corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / WEIGHTS).write_bytes(b"precious")
    with pytest.raises(UserError, match="did not train"):
        train(config_for(corpus, tiny_model, tmp_path / "adapter"))
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == b"precious"


def test_the_settings_of_a_foreign_adapter_are_not_overwritten(
    corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "adapter_config.json").write_text('{"precious": 1}')
    (out / "adapter_model.bin").write_bytes(b"pickled")  # whose file has another name than ours
    with pytest.raises(UserError, match=r"adapter_config\.json: is there already and was not wri"):
        train(config_for(corpus, tiny_model, out))
    assert (out / "adapter_config.json").read_text() == '{"precious": 1}'


def test_more_top_layers_than_layers(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"top_layers must be in \[1, 2\].* got 3"):
        train(config_for(corpus, tiny_model, tmp_path / "adapter", top_layers=3))


def test_top_layers_alone_are_adapted(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    loop = loop_for(config_for(corpus, tiny_model, tmp_path, top_layers=1), tmp_path / "c")
    assert loop._trained
    assert all(".layers.1." in name for name in loop._trained)
    assert linear_names(load_causal_lm(find_model(str(tiny_model)), dtype=torch.float32)) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


def test_a_loss_that_is_no_number_is_said(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    loop = loop_for(config_for(corpus, tiny_model, tmp_path), tmp_path / "c")
    with torch.no_grad():
        next(iter(loop._trained.values())).fill_(float("nan"))
    with pytest.raises(UserError, match="the loss became nan at step 1; lower --learning-rate"):
        loop.run()


@pytest.mark.parametrize(
    "state",
    [
        "[]",
        '{"identity": 1}',
        '{"identity": {}, "result": []}',
        '{"identity": {}, "result": {"history": {}, "of another version": 1}}',
    ],
)
def test_a_damaged_state_is_said(
    corpus: Path, tiny_model: Path, tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustft.training.refuse_changes", lambda *_: None)  # the same settings
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "training.json").write_text(state)
    (out / WEIGHTS).touch()
    (out / "checkpoint.safetensors").touch()
    with pytest.raises(UserError, match=r"training\.json: not the state of a training run"):
        train(config_for(corpus, tiny_model, out))


def test_other_settings_are_told_whatever_their_result_holds(
    corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "training.json").write_text('{"identity": {"seed": 7}, "result": {"new": 1}}')
    (out / WEIGHTS).touch()
    with pytest.raises(UserError, match=r"holds a run with another configuration: .*seed"):
        train(config_for(corpus, tiny_model, out))


def test_a_damaged_checkpoint_is_said(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: not a checkpoint of this run"):
        loop_for(config_for(corpus, tiny_model, tmp_path), checkpoint).resume()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"warmup": 1.0}, "warmup must be in [0, 1), got 1.0"),
        ({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1"),
        ({"cutoff": 3}, "cutoff must be at least 16, got 3"),
        ({"top_layers": 0}, "top_layers must be at least 1, got 0"),
        ({"alpha": 0}, "alpha must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range(changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig(input="x", out=Path("y"), **changes)
    assert says in str(caught.value)
