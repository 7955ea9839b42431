"""NoiseAL's two small scorers: which candidate answer a question gets, learnt in seconds.

Where all records share their options a scorer maps the question to them; elsewhere letters mean
something else in every question, and it scores each question together with each candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

_BATCH = 64
_LOG_ZERO = -4.0  # stands for log 0 in reversed cross-entropy (Wang et al. 2019, arXiv 1908.06112)
_SHARPEN = 0.5  # temperature of the targets of hard examples
_MIX = 0.75  # parameter of the Beta distribution that mixup draws from
_WIDTH = 1 << 12  # hashed n-gram features


class Scorer:
    """A linear head over `features`, trained on reliable, purified and hard examples.

    Parameters
    ----------
    features: [N, d] where candidates are the same for all, else [N * C, d]; dense or sparse.
    candidates: C.
    """

    def __init__(self, features: Any, candidates: int, shared: bool, seed: int) -> None:
        self.features = features
        self._candidates = candidates
        self._shared = shared
        torch.manual_seed(seed)
        self._head = torch.nn.Linear(int(features.shape[1]), candidates if shared else 1)
        self._optimizer = torch.optim.Adam(self._head.parameters(), lr=0.02)
        self._random = np.random.default_rng(seed)

    def rows(self, index: NDArray[np.int64]) -> torch.Tensor:
        """Features of some records: [n, d], or [n, C, d]."""
        wanted = index
        if not self._shared:
            wanted = (index[:, None] * self._candidates + np.arange(self._candidates)).ravel()
        part = self.features[wanted]
        dense = np.asarray(part.todense() if hasattr(part, "todense") else part, np.float32)
        found = torch.from_numpy(dense)
        return found if self._shared else found.view(len(index), self._candidates, -1)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """[n, C] from what `rows` returns."""
        found: torch.Tensor = self._head(features)
        return found if self._shared else found.squeeze(-1)

    @torch.no_grad()
    def probabilities(self, total: int) -> NDArray[np.float64]:
        """[total, C] for every record."""
        parts = [
            self.logits(self.rows(np.arange(low, min(low + 1024, total)))).softmax(-1)
            for low in range(0, total, 1024)
        ]
        return torch.cat(parts).double().numpy()

    def epoch(
        self,
        reliable: tuple[NDArray[np.int64], NDArray[np.int64]],
        purified: tuple[NDArray[np.int64], NDArray[np.int64]],
        hard: tuple[NDArray[np.int64], NDArray[np.float64]],
    ) -> None:
        """One pass: (records, labels) of R and P, (records, soft labels [n, C]) of H.

        Cross-entropy on R, reversed cross-entropy on P, mixup of features on H.
        """
        parts = [("r", i) for i in range(len(reliable[0]))]
        parts += [("p", i) for i in range(len(purified[0]))]
        parts += [("h", i) for i in range(len(hard[0]))]
        order = self._random.permutation(len(parts))
        for low in range(0, len(order), _BATCH):
            batch = [parts[i] for i in order[low : low + _BATCH]]
            chosen = {k: np.array([i for kind, i in batch if kind == k], np.int64) for k in "rph"}
            loss = torch.zeros(())
            if len(chosen["r"]):
                logits = self.logits(self.rows(reliable[0][chosen["r"]]))
                labels = torch.from_numpy(reliable[1][chosen["r"]])
                loss = loss + functional.cross_entropy(logits, labels, reduction="sum")
            if len(chosen["p"]):
                logits = self.logits(self.rows(purified[0][chosen["p"]]))
                labels = torch.from_numpy(purified[1][chosen["p"]])
                own = logits.softmax(-1).gather(1, labels[:, None])
                loss = loss - (_LOG_ZERO * (1.0 - own)).sum()
            if len(chosen["h"]):
                loss = loss + self._mixed(hard[0][chosen["h"]], hard[1][chosen["h"]])
            self._optimizer.zero_grad()
            (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    def _mixed(self, index: NDArray[np.int64], soft: NDArray[np.float64]) -> torch.Tensor:
        share = float(self._random.beta(_MIX, _MIX))
        share = max(share, 1.0 - share)
        other = torch.from_numpy(self._random.permutation(len(index)))
        features, targets = self.rows(index), torch.from_numpy(soft).float()
        mixed = share * features + (1.0 - share) * features[other]
        wanted = share * targets + (1.0 - share) * targets[other]
        return functional.cross_entropy(self.logits(mixed), wanted, reduction="sum")


def sharpened(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, C] the scorers' mean prediction, made more decided; soft labels of hard examples."""
    powered = probabilities ** (1.0 / _SHARPEN)
    return np.asarray(powered / powered.sum(1, keepdims=True))


def ngram_features(texts: Sequence[str]) -> Any:
    """[N, 4096] sparse, unit length: hashed character n-grams of 3 to 5."""
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(n_features=_WIDTH, analyzer="char_wb", ngram_range=(3, 5))
    return vectorizer.transform(texts).tocsr()
