"""Batch callables for `datasets.Dataset.map(…, batched=True)` and Ray Data's `map_batches`.

Each takes a batch as a mapping from column to values (lists, or NumPy arrays as Ray gives them) and
returns it with columns added. A null (None, or NaN as pandas has it) is no text: nothing is said of
it. They pickle as their settings: models and indexes are loaded in the process that works, on its
first batch, and held there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustft.config import EngineConfig
from robustft.embedding import Embedder, TextEmbedder
from robustft.engines import Engine, Failure, Message, Prompt, ResponseScore
from robustft.engines.factory import load_engine
from robustft.retrieval import CosineKNN
from robustft_kernels.answer_consistency import Metric, answer_consistency

__all__ = ["AgreeingAnswers", "NearestNeighbours", "ResponseScorer", "build_index"]

Batch = Mapping[str, Any]
_NAN = float("nan")
_UNSCORED = ResponseScore(0, _NAN, _NAN, _NAN, _NAN, _NAN)
_DTYPES: dict[str, type[np.generic]] = {"tokens": np.int64, "truncated": np.bool_}


class _Lazy:
    """Pickles as its settings, without the models and indexes that were loaded."""

    def __getstate__(self) -> dict[str, Any]:
        loaded = {
            name
            for name in vars(self)
            if isinstance(getattr(type(self), name, None), cached_property)
        }
        return {name: value for name, value in vars(self).items() if name not in loaded}


class ResponseScorer(_Lazy):
    """Adds token statistics of given responses: `response_nll`, `response_entropy` and more.

    The columns are the fields of `robustft.engines.ResponseScore` with "response_" before them:
    tokens, nll (eq. 7 of arXiv 2412.14922), entropy, max_entropy, margin (nats), rank, truncated.

    Args:
        model: hub id, folder or .gguf file; None is the embedded small model.
        prompt: the column of prompts: a text, or a list of {"role", "content"} turns.
        response: the column of responses.
        options: other fields of `robustft.config.EngineConfig`, such as device or dtype.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        prompt: str = "prompt",
        response: str = "response",
        **options: Any,
    ) -> None:
        self.config = EngineConfig(model=model, **options)
        self.prompt, self.response = prompt, response

    @cached_property
    def engine(self) -> Engine:
        """The model, loaded when it is first needed."""
        return load_engine(self.config)

    def score(self, prompts: Sequence[Any], responses: Sequence[Any]) -> list[ResponseScore]:
        """Statistics of every response, in order; NaN where it or its prompt is null."""
        pairs = {
            row: (prompt, str(response))
            for row, (prompt, response) in enumerate(
                zip(map(as_prompt, prompts), responses, strict=True)
            )
            if prompt is not None and not _is_null(response)
        }
        rows = list(pairs)
        found = [_UNSCORED] * len(responses)
        for places in self.engine.plan([pairs[row][0] for row in rows], 16):
            asked, given = zip(*(pairs[rows[place]] for place in places), strict=True)
            for place, score in zip(places, self.engine.score(asked, given), strict=True):
                if not isinstance(score, Failure):
                    found[rows[place]] = score
        return found

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The batch with its statistics: float32, NaN where there are none.

        `response_tokens` is int64, else 0, and `response_truncated` bool, else false.
        """
        scores = self.score(list(column(batch, self.prompt)), list(column(batch, self.response)))
        added = {
            f"response_{field.name}": np.array(
                [getattr(score, field.name) for score in scores],
                _DTYPES.get(field.name, np.float32),
            )
            for field in dataclasses.fields(ResponseScore)
        }
        return {**batch, **added}


def as_prompt(value: Any) -> Prompt | None:
    """A prompt from a text (one user turn) or from {"role", "content"} turns.

    None where it, or a turn's content, is null.
    """
    if _is_null(value):
        return None
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else list(value)
    if any(_is_null(turn["content"]) for turn in turns):
        return None
    return Prompt(tuple(Message(str(turn["role"]), str(turn["content"])) for turn in turns))


def column(batch: Batch, name: str) -> Any:
    """A column of a batch; a KeyError that says which there are."""
    if name not in batch:
        raise KeyError(f"no column {name!r}, only {', '.join(map(str, batch))}")
    return batch[name]


def _is_null(value: Any) -> bool:
    """Whether a column holds nothing here; NaN is how pandas says so."""
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


class AgreeingAnswers:
    """Adds what several answers to one question agree on.

    Columns: `majority` (the first answer of the largest cluster, None without answers),
    `majority_fraction`, `semantic_entropy` (nats) and, where `given` names a column,
    `given_support`, the share of answers that agree with the given one.

    Args:
        answers: the column of lists of up to 64 texts.
        given: the column of given answers, or None.
        metric, threshold: as in `robustft.answer_consistency`.
    """

    def __init__(
        self,
        answers: str = "answers",
        *,
        given: str | None = None,
        metric: Metric = "exact",
        threshold: float | None = None,
    ) -> None:
        self.answers, self.given, self.metric, self.threshold = answers, given, metric, threshold

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The batch with its agreement."""
        answers = [[] if _is_null(row) else list(row) for row in column(batch, self.answers)]
        given = None
        if self.given is not None:
            given = [None if _is_null(one) else one for one in column(batch, self.given)]
        found = answer_consistency(
            answers, metric=self.metric, threshold=self.threshold, given=given, threads=1
        )
        added = {
            "majority": [
                None if best < 0 else row[list(cluster).index(best)]
                for row, cluster, best in zip(answers, found.cluster, found.majority, strict=True)
            ],
            "majority_fraction": found.majority_fraction,
            "semantic_entropy": found.semantic_entropy,
        }
        if given is not None:
            added["given_support"] = found.given_support
        return {**batch, **added}


def build_index(
    texts: Sequence[str], path: str | Path, *, embedder: TextEmbedder | str | None = None
) -> CosineKNN:
    """Embed `texts`, number them from 0 and save their index to `path`; a null is near nothing."""
    made = Embedder(embedder) if embedder is None or isinstance(embedder, str) else embedder
    index = CosineKNN(_embed(made, texts)[0])
    index.save(path)
    return index


def _embed(
    embedder: TextEmbedder, texts: Sequence[Any]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """[N, d] embeddings, zero for a null, whose cosines are then all 0; and [N] which are null."""
    null = np.array([_is_null(text) for text in texts], np.bool_)
    vectors = np.zeros((len(null), embedder.dimensions), np.float32)
    vectors[~null] = embedder.encode([str(text) for text in texts if not _is_null(text)])
    return vectors, null


class NearestNeighbours(_Lazy):
    """Adds the nearest texts of a saved index, and which of them a text duplicates.

    Columns: `neighbours` [k] ids, `cosines` [k] (id -1 and NaN where there are fewer than k) and
    `duplicate_of`, the lowest id among the neighbours whose cosine is at least `duplicate`, or -1.
    A null text has no neighbours.
    With `own`, a row never finds itself, and duplicates only a row before it: filtering
    `duplicate_of == -1` keeps the first of every group of up to k + 1, however rows are batched.

    Args:
        index: a file that `build_index` or `CosineKNN.save` wrote; it is mapped, not loaded.
        text: the column of texts.
        own: the column of the rows' own ids in the index, or None.
        k: neighbours a row.
        duplicate: cosine from which a neighbour is a duplicate.
        embedder: hub id or folder; None is the embedded MiniLM. Must be the index's own.
    """

    def __init__(
        self,
        index: str | Path,
        *,
        text: str = "text",
        own: str | None = None,
        k: int = 8,
        duplicate: float = 0.95,
        embedder: str | None = None,
    ) -> None:
        if not 0 < duplicate <= 1:
            raise ValueError(f"duplicate must be in (0, 1], got {duplicate}")
        self.path, self.text, self.own, self.k = str(index), text, own, k
        self.duplicate, self.model = duplicate, embedder

    @cached_property
    def embedder(self) -> TextEmbedder:
        """The embedding model, loaded when it is first needed."""
        return Embedder(self.model)

    @cached_property
    def index(self) -> CosineKNN:
        """The index, mapped when it is first needed."""
        return CosineKNN.load(self.path, threads=1)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The batch with its neighbours."""
        vectors, null = _embed(self.embedder, column(batch, self.text))
        own = None if self.own is None else np.asarray(column(batch, self.own), np.int64)
        ids, cosines = self.index.search(vectors, self.k, exclude=own)
        ids[null], cosines[null] = -1, _NAN
        close = (cosines >= self.duplicate) & (ids >= 0)
        if own is not None:
            close &= ids < own[:, None]
        none = np.iinfo(np.int64).max
        lowest = np.where(close, ids, none).min(axis=1)
        added = {
            "neighbours": ids,
            "cosines": cosines,
            "duplicate_of": np.where(lowest == none, -1, lowest),
        }
        return {**batch, **added}
