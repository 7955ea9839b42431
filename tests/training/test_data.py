"""What is trained on: tokens, cuts, epochs and micro-batches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustft.engines.encoding import PromptEncoder, end_of_turn
from robustft.models import find_model, load_tokenizer
from robustft.records import open_records
from robustft.training.data import (
    encode_records,
    epoch_batches,
    fit,
    learning_rate_at,
    micro_batches,
)


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
