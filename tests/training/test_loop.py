"""The loss and its gradients, whatever is computed once, and whatever the architecture."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trained import WEIGHTS, config_for, loop_for

from robustft.config import EngineConfig, TrainConfig
from robustft.errors import UserError
from robustft.models import find_model, has_plain_cache, load_causal_lm, load_tokenizer
from robustft.training import load_adapter, train
from robustft.training.adapter import attach_adapter
from robustft.training.data import Example, TrainingSet
from robustft.training.loop import TrainingLoop, shared_prefix


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
        ("xLSTM", SMALL | {"hidden_size": 128, "num_blocks": 2, "num_heads": 2}),  # all logits
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
