"""Approximate cosine neighbours by faiss (HNSW): `robustft clean --retriever approximate`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustft.errors import UserError
from robustft.retrieval import Found

_LINKS = 32  # of a row to others in the graph
_SEARCHED = 128  # rows a search keeps in view, at least
_CHUNK = 8192  # rows added or searched at a time


def require_retriever(name: str) -> None:
    """Raise UserError unless what a retriever needs is installed."""
    if name == "approximate" and importlib.util.find_spec("faiss") is None:
        raise UserError(
            "--retriever approximate needs faiss, which is not installed: run "
            "`pip install 'robustft[approximate]'`"
        )


class ApproximateKNN:
    """A faiss HNSW graph as a `NeighbourIndex`.

    It may miss neighbours, and which ones may differ from run to run. The graph holds the rows in
    fp16; cosines are as exact as that.

    Parameters
    ----------
    parts: [n, d] float32 each; a row is found under its position in all of them together.
    threads: OpenMP threads of faiss, for the whole process; None leaves them alone.
    """

    def __init__(self, parts: Sequence[NDArray[np.float32]], *, threads: int | None = None) -> None:
        require_retriever("approximate")
        import faiss

        if threads is not None:
            faiss.omp_set_num_threads(threads)
        self._faiss, self._parts = faiss, parts
        self._index = faiss.IndexHNSWSQ(
            parts[0].shape[1], faiss.ScalarQuantizer.QT_fp16, _LINKS, faiss.METRIC_INNER_PRODUCT
        )
        for rows in self._chunks():
            self._index.add(rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._index.ntotal)

    def search(
        self, queries: NDArray[np.float32], k: int, *, allowed: NDArray[np.bool_] | None = None
    ) -> Found:
        """As `CosineKNN.search`: ids and cosines [Q, k], missing ones -1 and NaN."""
        faiss = self._faiss
        settings: dict[str, Any] = {"efSearch": max(_SEARCHED, 2 * k)}
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")  # must outlive the search
            settings["sel"] = faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(bits))
        cosines, ids = self._index.search(
            _unit(queries), k, params=faiss.SearchParametersHNSW(**settings)
        )
        return ids, np.where(ids < 0, np.float32(np.nan), cosines)

    def _chunks(self) -> Iterator[NDArray[np.float32]]:
        for part in self._parts:
            for start in range(0, len(part), _CHUNK):
                yield _unit(part[start : start + _CHUNK])


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.ascontiguousarray(rows / np.where(norms > 0, norms, 1), np.float32)
