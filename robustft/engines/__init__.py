"""Where text and token statistics come from: one protocol, several engines behind it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Message(NamedTuple):
    """One chat message; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


class Prompt(NamedTuple):
    """What one expert is asked.

    `prefix` opens the assistant's turn ("Answer:"); the model continues it. Message contents are
    data: an engine must never let them become control tokens.
    """

    messages: tuple[Message, ...]
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated continuation, without the prompt and without the end-of-text token."""

    text: str
    nll: NDArray[np.float32]  # [tokens] -log p of each generated token, nats
    entropy: NDArray[np.float32]  # [tokens] Shannon entropy of each next-token distribution, nats
    offsets: tuple[int, ...]  # [tokens + 1] character offset in `text` where each token starts
    prompt_tokens: int
    finished: bool  # False: cut off at max_new_tokens

    def span_mean(self, values: NDArray[np.float32], start: int, stop: int) -> float:
        """Mean of `values` over the tokens that overlap characters [start, stop); NaN if none.

        The tokens of one character that is split between them count together.
        """
        picked = [
            float(value)
            for value, low, high in zip(values, self.offsets[:-1], self.offsets[1:], strict=True)
            if low < stop and (high > start or (low == high and self._end_of_split(low) > start))
        ]
        return sum(picked) / len(picked) if picked else float("nan")

    def _end_of_split(self, start: int) -> int:
        """Where the character ends that a token without room is a part of; `start` if of none.

        ASCII is never split: before it stands what is decoded to nothing, such as a first space.
        """
        end = self.offsets[min(bisect.bisect_right(self.offsets, start), len(self.offsets) - 1)]
        return start if self.text[start:end].isascii() else end


@dataclass(frozen=True, slots=True)
class Choice:
    """Probabilities of a few allowed continuations, read from one prefill."""

    logprobs: NDArray[np.float32]  # [candidates] over the whole vocabulary (not renormalised), nats
    entropy: float  # Shannon entropy of the whole next-token distribution, nats
    prompt_tokens: int

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """[candidates] renormalised over the candidates; sums to one."""
        shifted = np.exp(self.logprobs.astype(np.float64) - float(self.logprobs.max()))
        return np.asarray(shifted / shifted.sum())


class TokenValues(NamedTuple):
    """Statistics of each token of a given text [tokens]; NaN where an engine cannot tell."""

    nll: NDArray[Any]  # nats
    entropy: NDArray[Any]  # nats
    margin: NDArray[Any]  # top-1 minus top-2 log-probability, nats
    rank: NDArray[Any]  # 0 = the model's first choice


@dataclass(frozen=True, slots=True)
class ResponseScore:
    """Teacher-forced statistics of a given response: means over its own tokens."""

    tokens: int
    nll: float  # eq. 7 of the paper, nats per token
    entropy: float  # mean Shannon entropy, nats
    max_entropy: float
    margin: float  # mean top-1 minus top-2 log-probability, nats
    rank: float  # mean rank of the given token, 0 = the model's first choice
    truncated: bool = False  # question and response did not fit the model's window as a whole

    @classmethod
    def of(cls, values: TokenValues, truncated: bool = False) -> ResponseScore:
        """The means over a response's tokens; NaN without any."""
        if len(values.nll) == 0:
            nan = float("nan")
            return cls(0, nan, nan, nan, nan, nan, truncated)
        return cls(
            tokens=len(values.nll),
            nll=float(values.nll.mean(dtype=np.float64)),
            entropy=float(values.entropy.mean(dtype=np.float64)),
            max_entropy=float(values.entropy.max()),
            margin=float(values.margin.mean(dtype=np.float64)),
            rank=float(values.rank.mean(dtype=np.float64)),
            truncated=truncated,
        )


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that got no usable answer: never stored, asked again on resume."""

    reason: str


@dataclass(frozen=True, slots=True)
class Abilities:
    """What an engine can do; where it is a server, what a probe at start-up found."""

    choose: bool = True  # log-probabilities of given continuations
    score: bool = True  # statistics of a given response
    nll: bool = True  # the log-probability of every generated token; NaN without it
    entropy: bool = True  # needs the whole vocabulary, a server gives the likeliest few; else NaN
    found: tuple[str, ...] = ()  # the probe's findings in words, for the manifest


@runtime_checkable
class Engine(Protocol):
    """The contract every engine fulfils; see the methods' comments for what a caller may assume.

    `plan` splits requests into batches deterministically: it depends on the requests alone, so a
    resumed run forms the same batches. The other methods take one such batch (or anything
    smaller) and return results in the order of the requests, a `Failure` where one got no usable
    answer.
    """

    name: str  # "transformers", "openai", "vllm"
    model_id: str
    revision: str
    abilities: Abilities
    embedded: bool  # the small model that comes with robustft, which gets less room to write
    at_a_time: int  # batches that keep it busy, asked from as many threads; 1 without a server

    @property
    def truncated(self) -> int:
        """Prompts cut to the model's window so far; 0 where the engine sees no tokens."""
        ...

    def plan(self, prompts: Sequence[Prompt], max_new_tokens: int = 0) -> list[list[int]]:
        """Indices of `prompts`, grouped into batches of similar length."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> Sequence[Generation | Failure]:
        """Continue every prompt; greedy unless the engine was made with a temperature."""
        ...

    def choose(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]
    ) -> Sequence[Choice | Failure]:
        """Log-probability of each candidate continuation of each prompt."""
        ...

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> Sequence[ResponseScore | Failure]:
        """Teacher-forced statistics of the given responses."""
        ...

    def cancel(self) -> None:
        """Make what other threads are waiting for fail; nothing where no server is asked."""
        ...
