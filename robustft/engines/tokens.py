"""What engines share that take token ids and tell log-probabilities, but no whole distribution.

They give the exact log-probability of every token written or given (eq. 7), not the entropy of the
distributions: that needs the whole vocabulary, and theirs is the likeliest few. It is NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustft.engines import (
    Abilities,
    Choice,
    Failure,
    Generation,
    Prompt,
    ResponseScore,
    TokenValues,
)
from robustft.engines.encoding import PromptEncoder

_NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Continuation:
    """What was written after a prompt; fields as in `robustft.engines.Generation`."""

    text: str
    nll: NDArray[np.float32]
    offsets: tuple[int, ...]
    finished: bool


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The likeliest next tokens: log-probabilities by token id where known, else by text."""

    by_id: dict[int, float]
    by_text: dict[str, float]

    def logprob(self, tokens: Sequence[int], text: str) -> float | None:
        """That of a continuation of one token, None where it is not among them."""
        if len(tokens) != 1:
            return None
        return self.by_id.get(tokens[0], self.by_text.get(text))

    @property
    def least(self) -> float:
        """The lowest of them: no other token is likelier."""
        return min([*self.by_id.values(), *self.by_text.values()], default=0.0)


def unlikely(candidates: Sequence[str]) -> Failure:
    """No candidate is among the likeliest tokens: nothing tells them apart."""
    return Failure(f"none of {', '.join(map(str.strip, candidates))} is among the likeliest tokens")


class TokenEngine(ABC):
    """`robustft.engines.Engine` over three questions to a backend; see the abstract methods."""

    name: str
    model_id: str
    revision: str
    abilities: Abilities
    embedded: bool
    at_a_time: int
    encoder: PromptEncoder
    batch: int  # requests that `plan` puts together

    @property
    def truncated(self) -> int:
        """Prompts cut to the model's window so far."""
        return self.encoder.truncated

    def plan(self, prompts: Sequence[Prompt], max_new_tokens: int = 0) -> list[list[int]]:
        """`prompts` in their order: the backend forms its own batches, shared prefixes together."""
        return slices(len(prompts), self.batch)

    @abstractmethod
    def _continue(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[list[int]],
        max_new_tokens: int,
        seeds: Sequence[int] | None,
    ) -> Sequence[Continuation | Failure]:
        """Continue every prompt."""

    @abstractmethod
    def _likeliest(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[list[int]],
        wanted: Sequence[Sequence[int]],
    ) -> Sequence[Likeliest | Failure]:
        """The likeliest next tokens of every prompt, and those `wanted` where that can be asked."""

    @abstractmethod
    def _forced(
        self, encoded: Sequence[list[int]], endings: Sequence[list[int]]
    ) -> Sequence[TokenValues | Failure]:
        """Statistics of `endings` after `encoded`; entropy is NaN."""

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[Generation | Failure]:
        """Continue every prompt; greedy, or sampled with `seeds` when temperature > 0."""
        encoded = self.encoder.fit(prompts, max_new_tokens)
        written = self._continue(prompts, encoded, max_new_tokens, seeds)
        return [
            said
            if isinstance(said, Failure)
            else Generation(
                said.text, said.nll, np.full_like(said.nll, _NAN), said.offsets, len(ids),
                said.finished,
            )
            for ids, said in zip(encoded, written, strict=True)
        ]  # fmt: skip

    def choose(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]
    ) -> list[Choice | Failure]:
        """Log-probability of each candidate continuation.

        A candidate that is not among the likeliest tokens is scored on its own; where the backend
        cannot score, it counts with the probability of the last of them, an upper bound, unless
        none of the candidates is among them.
        """
        encoded = self.encoder.fit(prompts, 8)
        endings = [
            [self.encoder.continuation(prompt.prefix, text) for text in texts]
            for prompt, texts in zip(prompts, candidates, strict=True)
        ]
        wanted = [[ids[0] for ids in row if len(ids) == 1] for row in endings]
        found = self._likeliest(prompts, encoded, wanted)
        logprobs: list[list[float] | Failure] = []
        asked: list[tuple[int, int, list[int]]] = []  # row, candidate, its tokens
        for row, (texts, likeliest) in enumerate(zip(candidates, found, strict=True)):
            if isinstance(likeliest, Failure):
                logprobs.append(likeliest)
                continue
            told = [likeliest.logprob(*pair) for pair in zip(endings[row], texts, strict=True)]
            if self.abilities.score:
                asked += [(row, n, endings[row][n]) for n, one in enumerate(told) if one is None]
            elif all(one is None for one in told):
                logprobs.append(unlikely(texts))
                continue
            logprobs.append([likeliest.least if one is None else one for one in told])
        forced = self._forced([encoded[row] for row, *_ in asked], [ids for *_, ids in asked])
        for (row, index, _), values_ in zip(asked, forced, strict=True):
            own = logprobs[row]
            if isinstance(values_, Failure):
                logprobs[row] = values_
            elif not isinstance(own, Failure):
                own[index] = -float(values_.nll.sum())
        return [
            values
            if isinstance(values, Failure)
            else Choice(np.array(values, dtype=np.float32), _NAN, len(ids))
            for values, ids in zip(logprobs, encoded, strict=True)
        ]

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> list[ResponseScore | Failure]:
        """Teacher-forced statistics of the given responses."""
        encoded, endings, cut = self.encoder.fit_with(prompts, responses, room=1)
        return [
            found if isinstance(found, Failure) else ResponseScore.of(found, cut[row])
            for row, found in enumerate(self._forced(encoded, endings))
        ]


def slices(count: int, size: int) -> list[list[int]]:
    """0 … count - 1 in runs of at most `size`."""
    return [list(range(low, min(low + size, count))) for low in range(0, count, size)]


def piece_offsets(pieces: Sequence[str], text: str) -> tuple[int, ...]:
    """[tokens + 1] where each token's text starts in `text`, end-of-text tokens left out.

    The pieces of a split character are not in `text`; the last of its tokens takes its room.
    """
    offsets = [0]
    tokens = 0  # up to the last one found
    reach = 1  # characters to skip at most: a space that a piece leaves out, and what is split
    for piece in pieces:
        at = offsets[-1]
        start = text.find(piece, at, at + reach + len(piece)) if piece else -1
        if start < 0:
            offsets.append(at)
            reach += len(piece)
        else:
            if len(offsets) > tokens + 1:
                offsets[-1] = start
            offsets.append(start + len(piece))
            tokens, reach = len(offsets) - 1, 1
    left = range(tokens, len(pieces))
    if left and offsets[-1] < len(text):
        # The text ends in a split character; where its tokens are spelt U+FFFD, the end is known.
        parts = [row for row in left if "\ufffd" in pieces[row]]
        tokens = (parts or left)[-1] + 1
        offsets[tokens] = len(text)
    return tuple(offsets[: tokens + 1])
