"""Token entropy and noise score in the logs of real trainers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from robustft.integrations.trainer_callback import TokenStatsCallback
from robustft.models import find_model, load_causal_lm, load_tokenizer

SIGNALS = ("token_entropy", "response_nll", "noise_score")


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Token ids with two labelled runs in every row."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 250, (count, 24), generator=generator)
        self.labels = self.ids.clone()
        self.labels[:, :6] = -100
        self.labels[:, 12:15] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[row], "labels": self.labels[row]}


def by_hand(model: Any, rows: Rows) -> dict[str, float]:
    """The signals of one batch in float64, run by run."""
    with torch.no_grad():
        logits = model(input_ids=rows.ids).logits.double()[:, :-1]
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    nll = -log_p.gather(-1, rows.ids[:, 1:, None])[..., 0]
    runs = [
        (row, slice(low - 1, high - 1))
        for row in range(len(rows))
        for low, high in ((6, 12), (15, 24))
    ]
    return {
        "token_entropy": float(torch.cat([entropy[run] for run in runs]).mean()),
        "response_nll": float(torch.cat([nll[run] for run in runs]).mean()),
        "noise_score": sum(1 - math.exp(-float(nll[run].mean())) for run in runs) / len(runs),
    }


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return load_causal_lm(find_model(str(tiny_model)), dtype=torch.float32)


def trainer_for(model: Any, rows: Rows, out: Path, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(out), use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, learning_rate=0.0, **settings,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_the_numbers_are_those_of_the_batch(model: Any, tmp_path: Path, adapted: bool) -> None:
    rows = Rows(8)
    expected = by_hand(model, rows)
    if adapted:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    trainer = trainer_for(
        model, rows, tmp_path, max_steps=2, logging_steps=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    seen: list[dict[str, float]] = []
    reporter = type("Reporter", (TokenStatsCallback.__base__,), {})()
    reporter.on_log = lambda args, state, control, logs, **known: seen.append(dict(logs))
    trainer.add_callback(reporter)
    TokenStatsCallback.attach(trainer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
    for entry in history:
        assert {name: entry[name] for name in SIGNALS} == pytest.approx(expected, abs=1e-5)
    assert [set(SIGNALS) <= set(logs) for logs in seen] == [True, True, False]


SMALL = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Granite", {"logits_scaling": 8.0}),
        ("HyperCLOVAX", {"logits_scaling": 0.2}),  # multiplies by what Granite divides by
        ("Cohere", {"logit_scale": 0.0625}),
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16}),
    ],
)
def test_logits_that_are_scaled_or_capped(
    tmp_path: Path, family: str, settings: dict[str, float]
) -> None:
    import transformers

    torch.manual_seed(0)
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    config = getattr(transformers, f"{family}Config")(**SMALL, **settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    rows = Rows(4)
    expected = by_hand(model.eval(), rows)
    trainer = trainer_for(
        model, rows, tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=4
    )
    TokenStatsCallback.attach(trainer)
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert {name: entry[name] for name in SIGNALS} == pytest.approx(expected, rel=1e-4)
    assert entry["loss"] == pytest.approx(entry["response_nll"], rel=1e-3)


@pytest.mark.parametrize("case", ["logits", "labels"])
def test_what_cannot_be_measured_is_said_once(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    settings: dict[str, Any] = {}
    if case == "logits":

        def bend(module: Any, args: Any, output: Any) -> None:
            output.logits = output.logits**3

        model.register_forward_hook(bend)
    else:
        settings["label_smoothing_factor"] = 0.1
    trainer = trainer_for(
        model, Rows(8), tmp_path, max_steps=3, logging_steps=1, per_device_train_batch_size=2,
        **settings,
    )  # fmt: skip
    callback = TokenStatsCallback.attach(trainer)
    trainer.train()
    says = {
        "logits": "the model's logits are not those of its output embedding",
        "labels": "the model is not given the labels, which label smoothing",
    }
    told = [r.message for r in caplog.records if "token statistics are not logged" in r.message]
    assert len(told) == 1
    assert says[case] in told[0]
    assert not any("response_nll" in entry for entry in trainer.state.log_history)
    assert not callback._hooks


def test_only_logged_steps_are_measured(model: Any, tmp_path: Path) -> None:
    trainer = trainer_for(
        model, Rows(12), tmp_path, max_steps=6, logging_steps=3, per_device_train_batch_size=2
    )
    callback = TokenStatsCallback.attach(trainer)
    measured: list[int] = []
    add = callback._signals.add
    callback._signals.add = lambda stats: (
        measured.append(trainer.state.global_step + 1),
        add(stats),
    )
    trainer.train()
    assert measured == [3, 6]
    assert not callback._hooks


@pytest.mark.integration
def test_trl(cleaned: Path, tiny_model: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import load_dataset

    data = load_dataset(
        "json", data_files=str(cleaned / "messages.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    source = find_model(str(tiny_model))
    trainer = trl.SFTTrainer(
        model=load_causal_lm(source, dtype=torch.float32),
        processing_class=load_tokenizer(source),
        train_dataset=data,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"), max_steps=3, per_device_train_batch_size=4,
            logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    TokenStatsCallback.attach(trainer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 3
    for entry in history:
        assert entry["response_nll"] == pytest.approx(entry["loss"], rel=1e-3)
        # TRL measures the entropy too: the mean over tokens of the same distributions.
        assert entry["token_entropy"] == pytest.approx(entry["entropy"], rel=1e-3)
        assert 0 < entry["noise_score"] <= 1
