from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commandline import call
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from robustft.config import EngineConfig, TrainConfig
from robustft.engines.encoding import PromptEncoder
from robustft.errors import UserError
from robustft.models import find_model, has_plain_cache, load_causal_lm, load_tokenizer
from robustft.records import open_records
from robustft.training import load_adapter, train
from robustft.training.adapter import attach_adapter, linear_names, save_adapter
from robustft.training.data import (
    Example,
    TrainingSet,
    encode_records,
    end_of_turn,
    epoch_batches,
    fit,
    learning_rate_at,
    micro_batches,
)
from robustft.training.loop import TrainingLoop, shared_prefix
from robustft.training.scratch import scratch_folder

WEIGHTS = "adapter_model.safetensors"
torch.set_num_threads(1)  # the tiny model gains nothing from more


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty choice questions whose answer is the colour that the question names."""
    path = tmp_path / "colours.jsonl"
    colours = ["red", "green", "blue"]
    with path.open("w") as file:
        for n in range(40):
            row = {
                "question": f"What colour? {'The very ' * (n % 5)}{colours[n % 3]} box",
                "options": colours,
                "answer": "ABC"[n % 3],
            }
            file.write(json.dumps(row) + "\n")
    return path


def config_for(corpus: Path, model: Path, out: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(
        input=str(corpus),
        out=out,
        batch_size=8,
        epochs=2,
        learning_rate=5e-3,
        engine=EngineConfig(model=str(model), device="cpu"),
    )
    return replace(base, **changes)


def loop_for(
    config: TrainConfig, checkpoint: Path, dtype: torch.dtype = torch.float32
) -> TrainingLoop:
    source = find_model(config.engine.model)
    data = encode_records(open_records(config.input), load_tokenizer(source), config.cutoff)
    model = attach_adapter(load_causal_lm(source, dtype=dtype), config, "tiny")
    return TrainingLoop(model, data, config, checkpoint)


# --- data ----------------------------------------------------------------------------------------


def test_only_the_answer_and_the_end_of_turn_carry_loss(corpus: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(find_model(str(tiny_model)))
    made = encode_records(open_records(str(corpus)), tokenizer, 2048)
    assert made.shortened == 0
    example = made.examples[0]
    assert tokenizer.decode(example.ids[-example.response :]) == " A<|im_end|>"
    prompt = tokenizer.decode(example.ids[: -example.response])
    assert prompt.endswith("<|im_start|>assistant\nAnswer:")
    assert "A. red\nB. green\nC. blue" in prompt


def test_free_text_is_trained_as_it_stands(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "qa.jsonl"
    text = "Because light is bent by water, which has a higher index than air. <|im_end|>"
    path.write_text(json.dumps({"question": "Why?", "answer": text}) + "\n")
    tokenizer = load_tokenizer(find_model(str(tiny_model)))
    (example,) = encode_records(open_records(str(path)), tokenizer, 2048).examples
    response = example.ids[-example.response :]
    assert tokenizer.decode(response) == text + "<|im_end|>"
    # The record's own "<|im_end|>" is spelled out; only the last token is the control token.
    assert (response == tokenizer.eos_token_id).sum() == 1


def test_long_records_are_tokenised_a_few_at_a_time(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "qa.jsonl"
    rows = [{"question": "x" * length, "answer": "y"} for length in (9, 9, 9, 999, 999, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(find_model(str(tiny_model)))
    whole = encode_records(open_records(str(path)), tokenizer, 512)
    calls: list[int] = []
    encode = PromptEncoder.encode
    monkeypatch.setattr("robustft.training.data._CHUNK", 2)
    monkeypatch.setattr("robustft.training.data._CHUNK_CHARACTERS", 500)
    monkeypatch.setattr(
        PromptEncoder,
        "encode",
        lambda self, prompts: calls.append(len(prompts)) or encode(self, prompts),
    )
    made = encode_records(open_records(str(path)), tokenizer, 512)
    assert calls == [2, 2, 1, 1]
    assert made.shortened == whole.shortened == 2
    found = zip(made.examples, whole.examples, strict=True)
    assert all((one.ids == other.ids).all() for one, other in found)


def test_end_of_turn_follows_the_template(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(find_model(str(tiny_model)))
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert end_of_turn(tokenizer) == ends[:1]
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_turn(tokenizer) == ends[:1]
    # One that takes no such turns tells no end of theirs.
    tokenizer.chat_template = "{{ raise_exception('a system turn comes first') }}"
    assert end_of_turn(tokenizer) == ends[1:]
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) == ends[1:]


def test_end_of_turn_may_be_a_control_token_without_a_name(tiny_model: Path) -> None:
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(find_model(str(tiny_model)))
    tokenizer.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<end>", special=False)])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in tokenizer.all_special_ids
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("<|im_end|>", "<|end|>")
    assert end_of_turn(tokenizer) == [end]
    tokenizer.chat_template = template.replace("<|im_end|>", "<end>")  # text, as any other
    assert end_of_turn(tokenizer) == [tokenizer.eos_token_id]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(16, 64))
def test_fit_keeps_both_ends(prompt: int, response: int, cutoff: int) -> None:
    head, tail = list(range(1000, 1000 + prompt)), list(range(2000, 2000 + response))
    example, cut = fit(head, tail, cutoff)
    ids = example.ids.tolist()
    assert len(ids) == min(prompt + response, cutoff)
    assert cut == (prompt + response > cutoff)
    assert ids[-example.response :] == tail[: example.response]
    assert example.response >= min(response, cutoff - cutoff // 2)
    if len(ids) > example.response + 1:
        assert ids[0] == head[0]
        assert ids[-example.response - 1] == head[-1]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=90),
    st.integers(1, 17),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_an_epoch_holds_every_record_once(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    array = np.array(lengths, np.int64)
    batches = epoch_batches(array, size, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    again = epoch_batches(array, size, seed, epoch)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


def test_epochs_differ_and_batches_hold_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 256)
    first, second = (epoch_batches(lengths, 8, 0, epoch) for epoch in (0, 1))
    assert any((a != b).any() for a, b in zip(first, second, strict=True))
    padded = sum(int(lengths[b].max()) * len(b) for b in first)
    assert padded < 1.1 * lengths.sum()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 200))
def test_micro_batches_stay_in_budget(lengths: list[int], budget: int) -> None:
    array = np.array(lengths, np.int64)
    parts = list(micro_batches(range(len(lengths)), array, budget))
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget


def test_learning_rate_rises_then_falls_as_a_cosine() -> None:
    rates = [learning_rate_at(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[55] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert 0 < rates[-1] < 0.001
    assert learning_rate_at(0, 1, 1.0, 0.0) == 1.0


# --- the loss ------------------------------------------------------------------------------------


def reference_loss(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """One row at a time, all logits, labels of -100 where there is no loss."""
    total = torch.zeros(())
    for example in examples:
        ids = torch.from_numpy(example.ids).long()[None]
        labels = ids.clone()
        labels[0, : len(example.ids) - example.response] = -100
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, labels[0, 1:], ignore_index=-100, reduction="sum"
        )
    return total


@pytest.mark.parametrize("cacheable", [True, False])
def test_loss_and_gradients_match_one_row_at_a_time(
    corpus: Path, tiny_model: Path, tmp_path: Path, cacheable: bool
) -> None:
    loop = loop_for(config_for(corpus, tiny_model, tmp_path), tmp_path / "c")
    for name, parameter in loop.model.named_parameters():
        if "lora_B" in name:  # zero at first: then no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    assert loop._cacheable
    loop._cacheable = cacheable
    examples = [loop._examples[i] for i in (0, 4, 7, 12)]
    assert shared_prefix(examples) >= 16

    def gradients(loss: torch.Tensor) -> torch.Tensor:
        loop.model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in loop._trained.values()])

    expected = reference_loss(loop.model, examples)
    found = loop.response_loss(examples)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradients(found), gradients(expected), rtol=1e-4, atol=1e-5)


def test_frozen_layers_are_computed_once_and_change_nothing(
    corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = config_for(corpus, tiny_model, tmp_path, top_layers=1)
    loop = loop_for(config, tmp_path / "c")
    assert loop._trunk is not None
    calls = []
    below = loop._trunk._below
    loop._trunk._below = lambda rows: calls.append(len(rows)) or below(rows)
    examples = [loop._examples[i] for i in (0, 4, 7, 12)]
    found = [loop.response_loss(examples).item() for _ in range(2)]
    expected = reference_loss(loop.model, examples).item()
    assert found == pytest.approx([expected] * 2, rel=1e-5)
    again = loop_for(config, tmp_path / "c")  # another training of the same model
    assert again.response_loss(examples).item() == pytest.approx(expected, rel=1e-5)
    assert sum(calls) <= 4
    assert all(example.ids.tobytes() in again._trunk._states for example in examples)


def test_dropout_is_not_kept_with_the_states(
    corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    loop = loop_for(config_for(corpus, tiny_model, tmp_path, top_layers=1), tmp_path / "c")
    assert loop._trunk is not None
    for layer in loop.model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5  # the model's own, as its configuration has it
    ids = loop._examples[0].ids
    loop.model.train()
    (trained,) = loop._trunk._below([ids])
    assert all(layer.training for layer in loop.model.get_decoder().layers)
    loop.model.eval()
    (evaluated,) = loop._trunk._below([ids])
    assert torch.equal(trained, evaluated)


SMALL = {"vocab_size": 120, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
WINDOW = SMALL | {"intermediate_size": 16, "num_key_value_heads": 1, "sliding_window": 24}


@pytest.mark.parametrize(
    ("family", "settings_"),
    [
        ("GPT2", {"vocab_size": 120, "n_layer": 2, "n_head": 2, "n_embd": 16}),  # Conv1D, positions
        ("Gemma2", WINDOW | {"head_dim": 8}),  # capped logits, alternating windows
        ("Mistral", WINDOW),
        ("Qwen3", SMALL | {"intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 8}),
        ("Phimoe", WINDOW | {"num_local_experts": 4}),  # a router that answers with two tensors
        ("Mamba", {"vocab_size": 120, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    ],
)
def test_other_architectures(
    corpus: Path, tmp_path: Path, family: str, settings_: dict[str, object]
) -> None:
    import transformers

    torch.manual_seed(0)
    shape = getattr(transformers, f"{family}Config")(**settings_)
    model = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else
                    f"{family}ForCausalLM")(shape)  # fmt: skip
    random = np.random.default_rng(0)
    start = random.integers(1, 120, 20)
    examples = [
        Example(np.concatenate([start, random.integers(1, 120, n)]).astype(np.int32), 1 + n // 4)
        for n in (9, 5, 14)
    ]
    config = config_for(corpus, tmp_path, tmp_path, top_layers=1)
    loop = TrainingLoop(
        attach_adapter(model, config, family), TrainingSet(examples), config, tmp_path / "c"
    )
    model.eval()  # dropout off, in GPT-2 for one
    found, expected = loop.response_loss(examples), reference_loss(loop.model, examples)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    tokens = sum(example.response for example in examples)
    assert loop._step([0, 1, 2]) == pytest.approx(expected.item() / tokens, rel=1e-4)


def test_a_model_that_peft_does_not_take_is_named(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(find_model(str(tiny_model)), dtype=torch.float32)
    monkeypatch.setattr("robustft.training.adapter.linear_names", lambda model: ["self_attn"])
    with pytest.raises(UserError, match=r"^tiny: LoRA does not take this model: Target module .*"):
        attach_adapter(model, TrainConfig(input="in.jsonl", out=Path("out")), "tiny")


def build_composite(tiny_model: Path, folder: Path) -> Path:
    """Write a random Gemma 3 that also sees, with the tokenizer of `tiny_model`."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = load_tokenizer(find_model(str(tiny_model)))
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=WINDOW | {"vocab_size": len(tokenizer), "head_dim": 8},
        vision_config=vision | {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=0, boi_token_index=0, eoi_token_index=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("top", [None, 1])
def test_of_a_model_that_also_sees_the_text_decoder_alone_is_adapted(
    corpus: Path, tiny_model: Path, tmp_path: Path, top: int | None
) -> None:
    folder = build_composite(tiny_model, tmp_path / "gemma3")
    config = config_for(corpus, folder, tmp_path / "adapter", epochs=1, top_layers=top)
    model = load_causal_lm(find_model(str(folder)), dtype=torch.float32)
    assert any("vision_tower" in name and "q_proj" in name for name, _ in model.named_modules())
    train(config)
    weights = load_file(config.out / WEIGHTS)
    assert {name.split(".layers.")[1][0] for name in weights} == set("01" if top is None else "1")
    assert all(".language_model." in name for name in weights)
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    ids = torch.arange(3, 20)[None]
    before = model(input_ids=ids).logits
    assert (load_adapter(model, config.out)(input_ids=ids).logits - before).abs().max() > 0


def test_what_no_gradient_reached_yet_is_saved_as_that(
    corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = config_for(corpus, tiny_model, tmp_path, checkpoint_seconds=0.0)

    def made(steps: int) -> TrainingLoop:
        loop = loop_for(replace(config, steps=steps), tmp_path / "c")
        unused = torch.nn.Parameter(torch.ones(3))  # an expert that no token is sent to
        loop._trained["unused"] = unused
        loop._optimizer.add_param_group({"params": [unused]})
        return loop

    made(2).run()
    again = made(3)
    again.resume()
    assert again.history.step == 2
    states = [again._optimizer.state.get(parameter) for parameter in again._trained.values()]
    assert states.pop() is None
    assert all(state["step"] == 2 for state in states)
    again.run()


def test_micro_batches_do_not_change_the_step(
    corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    losses = []
    for tokens in (10_000, 200, 1):
        engine = EngineConfig(model=str(tiny_model), device="cpu", batch_tokens=tokens)
        loop = loop_for(config_for(corpus, tiny_model, tmp_path, engine=engine), tmp_path / "c")
        losses.append([loop._step([3, 1, 5, 20, 9]) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_out_of_memory_halves_the_micro_batch(
    corpus: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loop_for(config_for(corpus, tiny_model, tmp_path), tmp_path / "c")
    real, asked = loop.response_loss, []

    def scarce(examples: list[Example]) -> torch.Tensor:
        asked.append(len(examples))
        if len(examples) > 2:
            raise torch.OutOfMemoryError("no")
        return real(examples)

    freed: list[object] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: freed.append(sys.exc_info()[1]))
    monkeypatch.setattr(loop, "response_loss", scarce)
    expected = reference_loss(loop.model, [loop._examples[i] for i in range(8)]).item() / 16
    assert loop._step(range(8)) == pytest.approx(expected, rel=1e-4)
    assert asked[0] == 8
    assert max(asked[-3:]) <= 2
    assert set(freed) == {None}  # an error that is still at hand holds the tensors of its frames

    def full(examples: list[Example]) -> torch.Tensor:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(loop, "response_loss", full)
    with pytest.raises(UserError, match="does not fit the device's memory"):
        loop._step(range(8))


def test_shared_prefix() -> None:
    def example(head: list[int], tail: int, response: int = 2) -> Example:
        return Example(np.array(head + [tail] * 5, np.int32), response)

    head = list(range(30))
    assert shared_prefix([example(head, 1), example(head, 2)]) == 30
    assert shared_prefix([example(head, 1), example(head, 1)]) == 32  # up to the predicting token
    assert shared_prefix([example(head, 1)]) == 0
    assert shared_prefix([example(head, 1), example([9, *head], 1)]) == 0
    assert shared_prefix([example(head[:9], 1), example(head[:9], 2)]) == 0


def test_windowed_attention_is_not_cached_as_a_prefix(tiny_model: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    assert not has_plain_cache(
        MistralForCausalLM(MistralConfig(**small, **heads, sliding_window=4))
    )
    assert has_plain_cache(load_causal_lm(find_model(str(tiny_model)), dtype=torch.float32))


# --- whole runs ----------------------------------------------------------------------------------


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


# --- what the user can get wrong -----------------------------------------------------------------


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


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    rows = [{"question": "q", "options": ["a", "b"], "answer": "A"}] * 2
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(config_for(data, tiny_model, folder / "out", epochs=1))
    return folder / "out"


def damaged(adapter: Path, tmp_path: Path, **changes: object) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        (copy / name).write_bytes((adapter / name).read_bytes())
    stored = json.loads((copy / "adapter_config.json").read_text()) | changes
    (copy / "adapter_config.json").write_text(json.dumps(stored))
    return copy


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "field 'peft_type': expected LORA, found 'IA3'"),
        ({"alora_invocation_tokens": [1, 2]}, "field 'alora_invocation_tokens'"),
        ({"unheard_of": {"a": 1}}, "field 'unheard_of': {'a': 1} is not supported"),
        ({"r": 4}, "does not fit the model"),
        ({"layers_to_transform": [0]}, "does not fit the model"),
        ({"target_modules": ["nothing"]}, "does not fit the model"),
        ({"target_modules": "("}, "does not fit the model"),
        ({"rank_pattern": None}, "does not fit the model"),
        ({"modules_to_save": {"q_proj": "x"}}, "does not fit the model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    adapter: Path, tiny_model: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    model = load_causal_lm(find_model(str(tiny_model)), dtype=torch.float32)
    with pytest.raises(UserError) as caught:
        load_adapter(model, damaged(adapter, tmp_path, **changes))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("base", ["tiny-llama", "owner/tiny-llama", "another", None])
def test_an_adapter_of_another_model_is_told(
    adapter: Path,
    tiny_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    base: str | None,
) -> None:
    folder = damaged(adapter, tmp_path, base_model_name_or_path=base)
    model = load_causal_lm(find_model(str(tiny_model)), dtype=torch.float32)
    load_adapter(model, folder, "tiny-llama")
    told = f"{folder}: the adapter was trained for another, as its settings say, not for tiny-llama"
    assert (told in caplog.text) == (base == "another") == bool(caplog.text)


def test_a_pickled_adapter_is_refused(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = load_causal_lm(find_model(str(tiny_model)), dtype=torch.float32)
    folder = damaged(adapter, tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="a pickle checkpoint, which can run code and is refused"):
        load_adapter(model, folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="is training unfinished"):
        load_adapter(model, folder)
    with pytest.raises(UserError, match="expected a LoRA adapter"):
        load_adapter(model, tmp_path)
    (folder / WEIGHTS).write_bytes(b"rubbish")
    with pytest.raises(UserError, match="does not fit the model"):
        load_adapter(model, folder)
