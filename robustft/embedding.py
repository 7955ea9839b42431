"""Sentence embeddings of questions, and the file that keeps them across a resume."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from robustft.errors import UserError
from robustft.models import ModelSource, find_embedder, load_encoder, load_tokenizer


class TextEmbedder(Protocol):
    """What turns questions into vectors; `Embedder` is the usual one."""

    model_id: str
    dimensions: int

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings [len(texts), dimensions], float32, in the order of `texts`."""
        ...


class Embedder:
    """Mean-pooled, unit-length sentence embeddings of a BERT-like encoder."""

    def __init__(self, spec: str | None = None, *, device: str = "cpu") -> None:
        source: ModelSource = find_embedder(spec)
        self.model_id = source.name
        self.embedded = source.embedded
        self._tokenizer = load_tokenizer(source)
        self._model = load_encoder(source).to(device)
        self._device = device
        config = self._model.config
        self.dimensions = int(config.hidden_size)
        # MiniLM was trained on 256 tokens; more only costs time.
        self._window = min(256, int(getattr(config, "max_position_embeddings", 256)))

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Embeddings [len(texts), dimensions], float32, unit length, in the order of `texts`."""
        result = np.empty((len(texts), self.dimensions), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        for low in range(0, len(order), batch_size):
            rows = order[low : low + batch_size]
            inputs = self._tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=self._window,
                return_tensors="pt",
                split_special_tokens=True,
            ).to(self._device)
            states = self._model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            pooled = (states * mask).sum(1) / mask.sum(1).clamp_min(1e-9)
            result[rows] = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
        return result


class EmbeddingFile:
    """Float32 rows in input order, appended chunk by chunk; a torn last row is cut on opening."""

    def __init__(self, path: Path, dimensions: int) -> None:
        self.path = path
        self.dimensions = dimensions
        self._file = path.open("ab")
        row = 4 * dimensions
        self.rows = self._file.tell() // row
        self._file.truncate(self.rows * row)

    def append(self, embeddings: NDArray[np.float32]) -> None:
        """Add rows [n, dimensions]; durable when this returns."""
        try:
            self._file.write(np.ascontiguousarray(embeddings, dtype=np.float32).tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        self.rows += len(embeddings)

    def memory_map(self) -> NDArray[np.float32]:
        """All rows [rows, dimensions], read-only, mapped rather than loaded."""
        if self.rows == 0:
            return np.empty((0, self.dimensions), dtype=np.float32)
        return np.memmap(self.path, dtype=np.float32, mode="r", shape=(self.rows, self.dimensions))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What could not be written above cannot be written now; that error is the one to show.
        with contextlib.suppress(*(() if kind is None else (OSError,))):
            self._file.close()
