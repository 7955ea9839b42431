"""An engine that never asks the same thing twice, whoever asks and in whichever run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import orjson

from robustft.cache import Cache, content_key
from robustft.config import EngineConfig
from robustft.engines import Abilities, Choice, Engine, Failure, Generation, Prompt, ResponseScore
from robustft.store import Stopwatch
from robustft.wording import wording

_T = TypeVar("_T")
_BATCH = 128


class CachedEngine:
    """`robustft.engines.Engine` before another, greedy one, made only when it is needed.

    Parameters
    ----------
    make: makes the engine that answers what the cache does not hold.
    identity: what else than the prompt an answer depends on (dtype, temperature, adapter).
    """

    at_a_time = 1

    def __init__(
        self,
        cache: Cache,
        make: Callable[[], Engine],
        *,
        model_id: str,
        embedded: bool = False,
        identity: Sequence[object] = (),
    ) -> None:
        self.name = "transformers"
        self.model_id = model_id
        self.revision = "local"
        self.embedded = embedded
        self.abilities = Abilities()
        self._cache = cache
        self._make = make
        self._identity = (model_id, *identity)
        self._engine: Engine | None = None
        self._truncated = 0  # by engines that were let go

    @property
    def truncated(self) -> int:
        """Prompts cut to the model's window so far, of those the cache had no answer to."""
        return self._truncated + (self._engine.truncated if self._engine else 0)

    @property
    def engine(self) -> Engine:
        """The engine behind, loaded on first use."""
        if self._engine is None:
            self._engine = self._make()
        return self._engine

    def release(self) -> None:
        """Let the model's memory go; it is loaded again when it is needed again."""
        self._truncated = self.truncated
        self._engine = None

    def speeds(self) -> dict[str, float]:
        """Tokens a second read (prompts) and written (replies), as far as they were measured."""
        found: dict[str, float] = {}
        for name in ("read", "written"):
            tokens, seconds = self._cache.get(self._speed_key(name)) or (0, 0.0)
            if seconds > 0:
                found[name] = tokens / seconds
        return found

    def _speed_key(self, name: str) -> bytes:
        return content_key("speed", name, *self._identity)

    def _measure(self, answers: Sequence[Any], seconds: float) -> None:
        """Add a batch's tokens and seconds up, for estimates."""
        written = sum(len(one.nll) for one in answers if isinstance(one, Generation))
        read = sum(getattr(one, "prompt_tokens", 0) for one in answers)
        name, tokens = ("written", written) if written else ("read", read)
        if tokens:
            before = self._cache.get(self._speed_key(name)) or (0, 0.0)
            total = (before[0] + tokens, before[1] + seconds)
            self._cache.replace(self._speed_key(name), total)

    def plan(self, prompts: Sequence[Prompt], max_new_tokens: int = 0) -> list[list[int]]:
        """Large batches in order; what of them is new is planned by the engine behind."""
        rows = list(range(len(prompts)))
        return [rows[low : low + _BATCH] for low in range(0, len(rows), _BATCH)]

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[Generation | Failure]:
        """Continue every prompt."""
        asked = [("generate", _spelt(p), max_new_tokens) for p in prompts]

        def ask(rows: list[int]) -> Sequence[Generation | Failure]:
            given = None if seeds is None else [seeds[row] for row in rows]
            return self.engine.generate([prompts[row] for row in rows], max_new_tokens, given)

        return self._answers(asked, prompts, max_new_tokens, ask, _generation)

    def choose(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]
    ) -> list[Choice | Failure]:
        """Log-probability of each candidate continuation of each prompt."""
        asked = [("choose", _spelt(p), list(c)) for p, c in zip(prompts, candidates, strict=True)]

        def ask(rows: list[int]) -> Sequence[Choice | Failure]:
            return self.engine.choose(
                [prompts[row] for row in rows], [candidates[row] for row in rows]
            )

        return self._answers(asked, prompts, 0, ask, _choice)

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> list[ResponseScore | Failure]:
        """Teacher-forced statistics of the given responses."""
        asked = [("score", _spelt(p), r) for p, r in zip(prompts, responses, strict=True)]

        def ask(rows: list[int]) -> Sequence[ResponseScore | Failure]:
            return self.engine.score([prompts[r] for r in rows], [responses[r] for r in rows])

        return self._answers(asked, prompts, 16, ask, lambda fields: ResponseScore(**fields))

    def cancel(self) -> None:
        """Nothing: no server is asked."""

    def _answers(
        self,
        asked: Sequence[Sequence[object]],
        prompts: Sequence[Prompt],
        room: int,
        ask: Callable[[list[int]], Sequence[_T | Failure]],
        read: Callable[[dict[str, Any]], _T],
    ) -> list[_T | Failure]:
        keys = [content_key(*self._identity, *one) for one in asked]
        stored = self._cache.find(list(dict.fromkeys(keys)))
        failed: dict[bytes, Failure] = {}
        missing = list({key: row for row, key in enumerate(keys) if key not in stored}.values())
        if missing:
            for batch in self.engine.plan([prompts[row] for row in missing], room):
                rows = [missing[index] for index in batch]
                fresh = {}
                watch = Stopwatch()
                answers = ask(rows)
                self._measure(answers, watch.seconds())
                for row, answer in zip(rows, answers, strict=True):
                    if isinstance(answer, Failure):
                        failed[keys[row]] = answer
                    else:
                        fresh[keys[row]] = _written(answer)
                self._cache.add(fresh)
                stored.update(fresh)
        return [failed[key] if key in failed else read(_read(stored[key])) for key in keys]


def _spelt(prompt: Prompt) -> list[object]:
    return [[(message.role, message.content) for message in prompt.messages], prompt.prefix]


def _written(answer: Any) -> bytes:
    return orjson.dumps(dataclasses.asdict(answer), option=orjson.OPT_SERIALIZE_NUMPY)


def _read(value: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = orjson.loads(value)
    return {name: float("nan") if field is None else field for name, field in fields.items()}


def _choice(fields: dict[str, Any]) -> Choice:
    logprobs = np.array(fields["logprobs"], np.float32)  # JSON has no -inf: null, read as NaN
    return Choice(**fields | {"logprobs": np.where(np.isnan(logprobs), -np.inf, logprobs)})


def _generation(fields: dict[str, Any]) -> Generation:
    arrays = {name: np.array(fields[name], np.float32) for name in ("nll", "entropy")}
    return Generation(**fields | arrays | {"offsets": tuple(fields["offsets"])})


class RememberingEngine(CachedEngine):
    """A ready engine whose answers last in a cache, so that a killed run goes on where it was.

    Parameters
    ----------
    engine: who answers what the cache does not hold.
    config: how `engine` was made.
    """

    def __init__(self, engine: Engine, cache: Cache, config: EngineConfig) -> None:
        super().__init__(
            cache, lambda: engine, model_id=engine.model_id,
            embedded=engine.embedded,
            identity=(engine.revision, config.fingerprint(), wording(engine)),
        )  # fmt: skip
        self.name, self.revision, self.abilities = engine.name, engine.revision, engine.abilities
        self.at_a_time = engine.at_a_time

    def plan(self, prompts: Sequence[Prompt], max_new_tokens: int = 0) -> list[list[int]]:
        """The batches of the engine behind, of which each is kept once it is answered."""
        return self.engine.plan(prompts, max_new_tokens)

    def cancel(self) -> None:
        """Cancel what the engine behind is asked."""
        self.engine.cancel()
