"""From records to token ids, and from token ids to batches: no model, no optimizer, no disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustft.engines.encoding import PromptEncoder, end_of_turn
from robustft.prompts import answer_prompt, response
from robustft.records import Record

_CHUNK = 256  # records tokenised in one call …
_CHUNK_CHARACTERS = 1 << 22  # … and about how long they may be: a character takes 60 bytes
_SORTED_TOGETHER = 32  # batches whose records are sorted by length together


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence: prompt, then response with the token that ends a turn."""

    ids: NDArray[np.int32]  # [tokens]
    response: int  # how many of the last tokens carry loss; at least 1


@dataclass(slots=True)
class TrainingSet:
    """Tokenised examples, and how many of them the cutoff shortened."""

    examples: list[Example]
    shortened: int = 0

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[examples] tokens of each."""
        return np.array([len(example.ids) for example in self.examples], np.int64)


def encode_records(records: Iterable[Record], tokenizer: Any, cutoff: int) -> TrainingSet:
    """Tokenise `records`: the base expert's prompt (eq. 1), the given answer as its response."""
    encoder = PromptEncoder(tokenizer)
    end = end_of_turn(tokenizer)
    made = TrainingSet([])
    for chunk in _chunks(records):
        prompts = [answer_prompt(record) for record in chunk]
        for record, prompt, head in zip(chunk, prompts, encoder.encode(prompts), strict=True):
            tail = [*encoder.response(prompt, response(prompt, record.answer)), *end]
            example, cut = fit(head, tail, cutoff)
            made.examples.append(example)
            made.shortened += cut
    return made


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    characters = 0
    for record in records:
        chunk.append(record)
        characters += len(record.question) + len(record.answer)
        if len(chunk) == _CHUNK or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def fit(prompt: Sequence[int], response: Sequence[int], cutoff: int) -> tuple[Example, bool]:
    """Shorten a sequence to `cutoff` tokens; the second value says whether that was needed.

    The response gives way only beyond half of the cutoff. The prompt loses its middle: its
    start holds the template, its end the cue to answer.
    """
    room = max(cutoff - len(prompt), cutoff - cutoff // 2)
    tail = list(response[:room])
    keep = cutoff - len(tail)
    head = list(prompt)
    if len(head) > keep:
        head = head[: keep - keep // 2] + head[len(head) - keep // 2 :]
    ids = np.array(head + tail, np.int32)
    return Example(ids, len(tail)), len(ids) < len(prompt) + len(response)


def epoch_batches(
    lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Split one epoch into batches of similar length, in an order fixed by (seed, epoch).

    Every index appears once; all batches but one hold `batch_size`. Records are shuffled, sorted
    by length within blocks of 32 batches, cut, and the batches shuffled again.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), batch_size * _SORTED_TOGETHER):
        block = order[start : start + batch_size * _SORTED_TOGETHER]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches += [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
    return [batches[index] for index in random.permutation(len(batches))]


def micro_batches(
    indices: Sequence[int], lengths: NDArray[np.int64], budget: int
) -> Iterator[list[int]]:
    """Cut one batch into forward passes of at most `budget` padded tokens, and at least one row."""
    current: list[int] = []
    widest = 0
    for index in sorted(indices, key=lambda i: (int(lengths[i]), i)):
        widest = max(widest, int(lengths[index]))
        if current and widest * (len(current) + 1) > budget:
            yield current
            current, widest = [], int(lengths[index])
        current.append(index)
    if current:
        yield current


def learning_rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Learning rate of `step` (from 0): a linear rise over the first `warmup` share, then cosine.

    transformers' cosine schedule, shifted by one step: there the first step has rate 0.
    """
    rise = math.ceil(steps * warmup)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
