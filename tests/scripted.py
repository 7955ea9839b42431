"""An engine whose answers are a function of the prompt: fast, deterministic, killable."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from robustft.engines import Abilities, Choice, Failure, Generation, Prompt, ResponseScore

REASON = "HTTP 500 (4 tries)"


class ScriptedEngine:
    """Follows `robustft.engines.Engine`; `before_batch` may raise, sleep or count."""

    name = "scripted"
    model_id = "scripted"
    revision = "1"
    embedded = False
    truncated = 0
    at_a_time = 1
    abilities = Abilities()

    def __init__(
        self,
        *,
        before_batch: Callable[[], None] = lambda: None,
        choose: Callable[[Prompt, Sequence[str]], Sequence[float]] | None = None,
        reply: Callable[[Prompt], str] | None = None,
    ) -> None:
        self.before_batch = before_batch
        self._choose = choose or hashed
        self._reply = reply or (lambda prompt: f"reply {digest(prompt) % 7}")
        self.asked: list[Prompt] = []

    def plan(self, prompts: Sequence[Prompt], max_new_tokens: int = 0) -> list[list[int]]:
        rows = list(range(len(prompts)))
        return [rows[low : low + 8] for low in range(0, len(rows), 8)]

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[Generation]:
        self._ask(prompts)
        return [self._generation(self._reply(prompt)) for prompt in prompts]

    def _generation(self, text: str) -> Generation:
        nll = np.array([0.1 + (ord(c) % 10) / 10 for c in text], dtype=np.float32)
        return Generation(text, nll, nll, tuple(range(len(text) + 1)), 10, True)

    def choose(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]
    ) -> list[Choice]:
        self._ask(prompts)
        return [
            Choice(np.log(np.array(self._choose(p, c), dtype=np.float32)), 1.0, 10)
            for p, c in zip(prompts, candidates, strict=True)
        ]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[ResponseScore]:
        self._ask(prompts)
        return [ResponseScore(len(r), 1.0, 1.0, 1.0, 1.0, 1.0) for r in responses]

    def cancel(self) -> None:
        pass

    def _ask(self, prompts: Sequence[Prompt]) -> None:
        self.before_batch()
        self.asked.extend(prompts)


def digest(prompt: Prompt) -> int:
    return int.from_bytes(hashlib.blake2b(repr(prompt).encode(), digest_size=4).digest(), "big")


def hashed(prompt: Prompt, candidates: Sequence[str]) -> list[float]:
    """Probabilities drawn from the prompt's hash; they do not sum to one, as in a real model."""
    random = np.random.default_rng(digest(prompt))
    return list(random.dirichlet(np.ones(len(candidates))) * 0.9 + 1e-3)


class FlakyEngine(ScriptedEngine):
    """Fails on every request whose hash is divisible by `every`."""

    def __init__(self, every: int, **scripted: Any) -> None:
        super().__init__(**scripted)
        self.every = every
        self.failed = 0

    def _or_failure(self, prompts: Sequence[Prompt], replies: Sequence[Any]) -> list[Any]:
        found = [
            Failure(REASON) if digest(prompt) % self.every == 0 else reply
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        self.failed += sum(isinstance(reply, Failure) for reply in found)
        return found

    def generate(self, prompts: Sequence[Prompt], *rest: Any) -> list[Any]:
        return self._or_failure(prompts, super().generate(prompts, *rest))

    def choose(self, prompts: Sequence[Prompt], *rest: Any) -> list[Any]:
        return self._or_failure(prompts, super().choose(prompts, *rest))

    def score(self, prompts: Sequence[Prompt], *rest: Any) -> list[Any]:
        return self._or_failure(prompts, super().score(prompts, *rest))


class LetterEmbedder:
    """Embeddings from letter counts: no model to load."""

    model_id = "letters"
    embedded = False
    dimensions = 26

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        rows = np.zeros((len(texts), 26), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for c in text.lower():
                if "a" <= c <= "z":
                    row[ord(c) - 97] += 1
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def slowly(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)
