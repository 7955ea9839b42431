"""Sentence embeddings of questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

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
