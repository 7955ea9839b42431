"""Whole runs: what is learnt, stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commandline import call
from safetensors import SafetensorError
from safetensors.torch import load_file
from trained import WEIGHTS, config_for, loop_for

from robustft.errors import UserError
from robustft.models import find_model, load_causal_lm, load_tokenizer
from robustft.training import load_adapter, train
from robustft.training.adapter import save_adapter
from robustft.training.loop import TrainingLoop
from robustft.training.scratch import scratch_folder


def test_training_learns_and_the_adapter_is_standard_peft(
    corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    out = tmp_path / "adapter"
    result = train(config_for(corpus, tiny_model, out, epochs=8, learning_rate=2e-2))
    losses = result.history.epoch_losses
    assert len(losses) == 8
    assert losses[-1] < 0.6 * losses[0]
    assert result.history.step == 8 * 5
    assert result.history.response_tokens == 8 * 40 * 2
    assert {p.name for p in out.iterdir()} - {".lock"} == {
        "README.md", WEIGHTS, "adapter_config.json", "training.json",
    }  # fmt: skip
    stored = json.loads((out / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == tiny_model.name
    assert (stored["r"], stored["lora_alpha"], stored["lora_dropout"]) == (8, 16, 0.0)
    assert "all linear layers of all layers" in (out / "README.md").read_text()
    said = str(result).splitlines()
    assert said[0].startswith("40 records: trained in 40 steps on ")
    assert [line.split()[0] for line in said[1:-1]] == ["loss", "adapter", "took", "next:"]
    assert said[-1] == f"  robustft eval TEST_FILE --model {tiny_model} --adapter {out}"

    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    base = load_causal_lm(find_model(str(tiny_model)), dtype=torch.float32)
    plain = base(input_ids=ids).logits
    ours = load_adapter(base, out)(input_ids=ids).logits
    other = load_causal_lm(find_model(str(tiny_model)), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(other, out).eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 0.1
    half = load_causal_lm(find_model(str(tiny_model)), dtype=torch.bfloat16)
    close = load_adapter(half, out)(input_ids=ids).logits.float()
    assert (close - theirs).abs().mean() < 0.1 * theirs.abs().mean()


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e3])
def test_float16_gradients_neither_underflow_nor_overflow(
    corpus: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    plain = TrainingLoop.response_loss
    monkeypatch.setattr(
        TrainingLoop, "response_loss", lambda self, examples: factor * plain(self, examples)
    )
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, _: clip(p, float("inf")))
    gradients = []
    for dtype in (torch.float32, torch.float16):
        loop = loop_for(config_for(corpus, tiny_model, tmp_path), tmp_path / "none", dtype)
        loop._step(range(8))
        gradients.append(torch.cat([p.grad.flatten() for p in loop._trained.values()]))
        assert loop.history.loss_scale <= (1 if dtype == torch.float32 else 2**16)
    exact, scaled = gradients
    assert (scaled - exact).norm() < 0.02 * exact.norm()


def test_float16_gradients_that_no_scale_holds_are_told(
    corpus: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TrainingLoop.response_loss
    monkeypatch.setattr(
        TrainingLoop, "response_loss", lambda self, examples: 1e30 * plain(self, examples)
    )
    loop = loop_for(config_for(corpus, tiny_model, tmp_path), tmp_path / "none", torch.float16)
    with pytest.raises(UserError, match=r"the gradient became \w+ at .* leave --dtype float16$"):
        loop.run()


def test_a_float16_checkpoint_of_before_goes_on_with_a_scale(
    corpus: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(corpus, tiny_model, tmp_path)
    loop = loop_for(config, tmp_path / "c", torch.float16)
    with monkeypatch.context() as before:
        before.setattr(
            "robustft.training.loop.asdict",
            lambda history: {k: v for k, v in asdict(history).items() if k != "loss_scale"},
        )
        loop._save()
    resumed = loop_for(config, tmp_path / "c", torch.float16)
    resumed.resume()
    assert resumed.history.loss_scale == 2**16


def test_reading_shows_its_progress(
    corpus: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("robustft.progress._SECONDS_BETWEEN_LINES", 0.0)
    train(config_for(corpus, tiny_model, tmp_path / "adapter", steps=1))
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("robustft: read: ") for line in said) == 40


def test_records_are_cut_to_the_models_window(
    corpus: Path, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = load_tokenizer(find_model(str(tiny_model)))
    size = {"vocab_size": len(tokenizer), "n_layer": 1, "n_head": 2, "n_embd": 16}
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(**size, n_positions=64)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = train(config_for(corpus, folder, tmp_path / "adapter", epochs=1))
    assert result.shortened == 40
    assert result.history.tokens == 40 * 64
    assert "40 records are longer than 64 tokens and are cut" in caplog.text
    assert "| cutoff | 64 tokens (40 records were cut) |" in (result.out / "README.md").read_text()


def test_one_record_is_told_of_as_one(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"question": "Why? " * 40, "answer": "So."}) + "\n")
    result = train(config_for(path, tiny_model, tmp_path / "adapter", epochs=1, cutoff=16))
    assert "1 record is longer than 16 tokens and is cut" in caplog.text
    written = (result.out / "README.md").read_text()
    assert "\n1 record of `one.jsonl`, loss on" in written
    assert "| cutoff | 16 tokens (1 record was cut) |" in written


@pytest.mark.parametrize("killed", ["checkpoint", "adapter"])
def test_what_killed_runs_left_goes(
    corpus: Path, tiny_model: Path, tmp_path: Path, killed: str
) -> None:
    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    config = config_for(corpus, tiny_model, tmp_path / "adapter", epochs=1)
    config.out.mkdir()
    process = os.fork()
    if not process:
        if killed == "adapter":
            save_adapter(SimpleNamespace(save_pretrained=die), config.out)
        with scratch_folder(config.out / "checkpoint.safetensors") as folder:
            (folder / ".tmp123").touch()
            die()
    os.waitpid(process, 0)
    assert len(list(config.out.iterdir())) == 1
    (config.out / ".checkpoint.safetensors.7.tmp").touch()
    train(config)
    assert list(config.out.glob(".*.tmp")) == []


@pytest.mark.parametrize("what", ["checkpoint", "adapter"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    corpus: Path, tiny_model: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each library writes through one beside the file, and has an error of its own."""
    seen: list[Path] = []

    def full(tensors: object, path: str | Path, **_: object) -> None:
        seen.append(Path(path))
        raise SafetensorError('No space left on device (os error 28) at path "x"')

    config = config_for(corpus, tiny_model, tmp_path / "adapter", epochs=1)
    place = {
        "checkpoint": "safetensors.torch.save_file",
        "adapter": "peft.peft_model.safe_save_file",
    }
    with monkeypatch.context() as patched:
        patched.setattr(place[what], full)
        with pytest.raises(UserError, match=rf"{what}.*: cannot be written: No space .*28\)$"):
            train(config)
    assert seen[0].parent.name.startswith(".scratch.")
    assert list(config.out.glob(".scratch*")) == []
    assert train(config).history.step == 5


def test_a_finished_run_is_not_repeated(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = config_for(corpus, tiny_model, tmp_path / "adapter", epochs=1)
    first = train(config)
    written = (config.out / WEIGHTS).stat().st_mtime_ns
    again = train(config)
    assert again == replace(first, resumed=first.history.step)
    assert str(again).startswith("40 records: the adapter was there already; trained in 5 steps on")
    assert (config.out / WEIGHTS).stat().st_mtime_ns == written


def test_stopped_after_any_step_and_resumed_ends_the_same(
    corpus: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_ = {"dropout": 0.1, "checkpoint_seconds": 0.0}
    whole = config_for(corpus, tiny_model, tmp_path / "whole", **settings_)
    train(whole)
    broken = config_for(corpus, tiny_model, tmp_path / "broken", **settings_)
    real, stops = TrainingLoop._step, iter((1, 3, 4, 7, 10**9))

    class Killed(BaseException):
        pass

    limit = next(stops)

    def step(self: TrainingLoop, batch: list[int]) -> float:
        if self.history.step >= limit:
            raise Killed
        return real(self, batch)

    monkeypatch.setattr(TrainingLoop, "_step", step)
    while True:
        try:
            result = train(broken)
            break
        except Killed:
            assert not (broken.out / WEIGHTS).exists()
            limit = next(stops)
    assert result.resumed == 7
    assert result.history.step == 10
    expected, found = load_file(whole.out / WEIGHTS), load_file(broken.out / WEIGHTS)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


SIGNALLED = """
import sys
from pathlib import Path
from robustft.config import EngineConfig, TrainConfig
from robustft.training import train
corpus, model, out = sys.argv[1:]
engine = EngineConfig(model=model, device="cpu")
config = TrainConfig(input=corpus, out=Path(out), batch_size=8, epochs=400, learning_rate=5e-3,
                     checkpoint_seconds=0.0, engine=engine)
try:
    train(config)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_has_the_status_it_has_in_every_command(
    corpus: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sent: signal.Signals,
    status: int,
    says: str,
) -> None:
    real = TrainingLoop._step

    def step(self: TrainingLoop, batch: list[int]) -> float:
        os.kill(os.getpid(), sent)
        return real(self, batch)

    out = tmp_path / "adapter"
    monkeypatch.setattr(TrainingLoop, "_step", step)
    done = call(capsys, "train", corpus, "--out", out, "--model", tiny_model, "--device", "cpu")
    assert done.status == status
    resume = f"robustft: {says}; run the same command again to resume"
    assert done.err.splitlines()[-1] == resume
    assert (out / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("name", [signal.SIGKILL, signal.SIGINT])
def test_a_signalled_run_resumes(
    corpus: Path, tiny_model: Path, tmp_path: Path, name: signal.Signals
) -> None:
    out = tmp_path / "adapter"
    config = config_for(corpus, tiny_model, out, epochs=400, checkpoint_seconds=0.0)
    command = [sys.executable, "-c", SIGNALLED, str(corpus), str(tiny_model), str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=env)
    checkpoint = out / "checkpoint.safetensors"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(name)
    assert process.wait(300) == (-signal.SIGKILL if name == signal.SIGKILL else 130)
    loop = loop_for(config, checkpoint)
    loop.resume()
    assert loop.history.step >= 1
