"""Where cells get their parts: answers, embeddings, training sets, adapters and evaluations.

Everything is kept by the content it depends on, under `OUT/cache`, so that methods, tables and
figures share it, a killed grid goes on where it was, and a second call only reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustft.cache import Cache, content_key
from robustft.config import CleanConfig, EngineConfig, EvalConfig, TrainConfig, experts_for
from robustft.embedding import Embedder, TextEmbedder
from robustft.engines import Engine, Failure
from robustft.engines.cached import CachedEngine
from robustft.engines.factory import load_engine
from robustft.errors import UserError
from robustft.evaluation import EvalResult, evaluate
from robustft.files import locked
from robustft.methods import Method, Setting
from robustft.metrics import Tally
from robustft.models import (
    DEFAULT_EMBEDDER,
    ModelSource,
    content_digest,
    find_embedder,
    find_model,
)
from robustft.outputs import read_manifest
from robustft.predictions import Ask, Judge, ask_plainly
from robustft.provenance import made_by
from robustft.records import Record, open_records
from robustft.reproduction.presets import Preset
from robustft.scoring import response_request
from robustft.training import train


class CachedEmbedder:
    """Embeddings kept by text; the encoder is loaded on first use."""

    def __init__(self, cache: Cache, spec: str | None) -> None:
        self._cache, self._spec = cache, spec
        self.model_id = spec or DEFAULT_EMBEDDER
        self.identity = identity_of(find_embedder(spec))
        self._embedder: TextEmbedder | None = None
        stored = cache.get(content_key("dimensions", self.identity))
        self.dimensions = int(stored) if stored else self._loaded().dimensions
        if not stored:
            cache.put(content_key("dimensions", self.identity), self.dimensions)

    def _loaded(self) -> TextEmbedder:
        if self._embedder is None:
            self._embedder = Embedder(self._spec)
        return self._embedder

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings [len(texts), dimensions]."""
        keys = [content_key("embed", self.identity, text) for text in texts]
        stored = self._cache.find(list(dict.fromkeys(keys)))
        missing = list({key: row for row, key in enumerate(keys) if key not in stored}.values())
        for low in range(0, len(missing), 256):
            rows = missing[low : low + 256]
            fresh = self._loaded().encode([texts[row] for row in rows])
            values = {keys[row]: one.tobytes() for row, one in zip(rows, fresh, strict=True)}
            self._cache.add(values)
            stored.update(values)
        flat = b"".join(stored[key] for key in keys)
        return np.frombuffer(flat, np.float32).reshape(len(texts), self.dimensions).copy()


@dataclass(frozen=True, slots=True)
class TrainingData:
    """A training set: its file, and how many of its first records count."""

    path: Path
    limit: int | None
    powerless: bool = False


class Workshop:
    """Makes what cells need for one base model, once."""

    def __init__(
        self, folder: Path, engine: EngineConfig, preset: Preset, embedder: str | None = None
    ) -> None:
        self.folder = folder
        self.preset = preset
        self.config = dataclasses.replace(engine, dtype=preset.dtype, attention=preset.attention)
        self.source = find_model(engine.model)
        self.model = identity_of(self.source)
        self.cache = Cache(folder / "answers.sqlite")
        self._embedder = embedder
        self.embedder = CachedEmbedder(self.cache, embedder)
        self.engine = self._engine(None)

    def _engine(self, adapter: Path | None, identity: Sequence[object] = ()) -> CachedEngine:
        def make() -> Engine:
            if adapter is not None:
                self.engine.release()
            return load_engine(self.config, adapter)

        return CachedEngine(
            self.cache, make, model_id=self.source.name, embedded=self.source.embedded,
            identity=(self.model, self.config.dtype, *identity),
        )  # fmt: skip

    def _alone(self, name: str, doing: str) -> contextlib.AbstractContextManager[object]:
        """Holds what bears that name for this process; another that needs it waits for it."""
        return locked(self.folder / "locks" / name, wait=doing)

    # --- training sets -------------------------------------------------------------------------

    def clean_config(self, data: TrainingData, seed: int, **settings: Any) -> CleanConfig:
        """The configuration of a clean run; its folder is set by `prepared`."""
        return CleanConfig(
            input=str(data.path), out=self.folder, limit=data.limit, seed=seed,
            embedder=self._embedder, engine=self.config,
            experts=experts_for(
                self.source.embedded,
                rounds=self.preset.rounds,
                reasoning_tokens=self.preset.reasoning_tokens,
            ),
            **settings,
        )  # fmt: skip

    def prepared(self, method: Method, config: CleanConfig) -> TrainingData:
        """The training set a method makes of the noisy one. Raises UserError where it is empty."""
        if method.prepare is None:
            return TrainingData(Path(config.input), config.limit)
        identity = config.fingerprint() | {
            "input": _content(config.input), "files": [self.model, self.embedder.identity],
        }  # fmt: skip
        out = self.folder / "sets" / f"{method.name}-{content_key(method.name, identity).hex()}"
        with self._alone(out.name, "prepares the same training set"):
            known = read_manifest(out)
            if "counts" not in known or known.get("unanswered"):
                method.prepare(
                    Setting(dataclasses.replace(config, out=out), self.engine, self.embedder)
                )
                known = read_manifest(out)
        counts = known["counts"]
        if not counts.get("keep", 0) + counts.get("relabel", 0):
            raise UserError("the method left no record to train on")
        cleaned = next(path for path in out.glob("cleaned.*"))
        return TrainingData(cleaned, None, bool(known.get("powerless")))

    # --- adapters ------------------------------------------------------------------------------

    def adapter(self, data: TrainingData, steps: int, seed: int) -> Path:
        """A LoRA adapter trained on `data` for so many steps, whatever its size."""
        preset = self.preset
        config = TrainConfig(
            input=str(data.path), out=self.folder, limit=data.limit, seed=seed, steps=steps,
            learning_rate=preset.learning_rate, batch_size=preset.batch_size,
            top_layers=preset.top_layers, engine=self.config,
        )  # fmt: skip
        identity = config.fingerprint() | {
            "input": _content(str(data.path)), "files": self.model,
        }  # fmt: skip
        out = self.folder / "adapters" / content_key("adapter", identity).hex()
        self.engine.release()
        with self._alone(out.name, "trains the same adapter"):
            history = train(dataclasses.replace(config, out=out)).history
        if history.seconds > 0:
            self.cache.replace(self._speed_key, {"trained": history.tokens / history.seconds})
        return out

    @property
    def _speed_key(self) -> bytes:
        return content_key("speed", self.model)

    def speeds(self) -> dict[str, float]:
        """Tokens a second read, written and trained on, as far as they were measured here."""
        found = dict(self.cache.get(self._speed_key) or {})
        return found | self.engine.speeds()

    # --- evaluations ---------------------------------------------------------------------------

    def evaluation(
        self,
        test: Path,
        limit: int | None,
        *,
        adapter: Path | None = None,
        ask: Ask = ask_plainly,
        judge: Judge,
        asked: object = None,
    ) -> tuple[EvalResult, str]:
        """Accuracy on a test file, and what made it; `asked` tells this `ask` from others."""
        name = None if adapter is None else adapter.name
        key = content_key(
            "evaluation", self.model, self.config.dtype, name, _content(str(test)), limit,
            judge.__name__, asked,
        )  # fmt: skip
        with self._alone(key.hex(), "evaluates the same"):
            stored = self.cache.get(key)
            if stored is None:
                engine = self.engine if adapter is None else self._engine(adapter, [name])
                config = EvalConfig(str(test), limit=limit, engine=self.config)
                result = evaluate(config, engine=engine, ask=ask, judge=judge)
                stored = dataclasses.asdict(result) | {"made_by": made_by()}
                if not result.failed:  # what got no reply is asked again next time
                    self.cache.put(key, stored)
        return _evaluated(stored)

    def perplexities(self, test: Path, limit: int | None, adapter: Path | None) -> list[float]:
        """exp(mean nll) of each right answer of a test file, by the model with the adapter."""
        engine = self.engine if adapter is None else self._engine(adapter, [adapter.name])
        records = read(test, limit)
        requests = [response_request(record) for record in records]
        found: list[float] = []
        for rows in engine.plan([prompt for prompt, _ in requests]):
            scores = engine.score([requests[r][0] for r in rows], [requests[r][1] for r in rows])
            found += [float(np.exp(s.nll)) for s in scores if not isinstance(s, Failure)]
        return found


def read(path: Path, limit: int | None) -> list[Record]:
    """The readable records of a file."""
    return [item for item in open_records(str(path), limit=limit) if isinstance(item, Record)]


def identity_of(source: ModelSource) -> str:
    """What tells a model from others: its name, and of a local one its content."""
    return f"{source.name} {content_digest(source)}"


def _content(path: str) -> str:
    return open_records(path).content_hash


def _evaluated(stored: dict[str, Any]) -> tuple[EvalResult, str]:
    made = stored.pop("made_by", "robustft of a version that was not kept")
    tallies = {name: Tally(**tally) for name, tally in stored["categories"].items()}
    parts = {"overall": Tally(**stored["overall"]), "categories": tallies}
    return EvalResult(**stored | parts), made
