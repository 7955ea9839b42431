"""The definition of exact cosine kNN in plain numpy fp64, which `CosineKNN` equals bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_LANES = 16
_SLAB = 1 << 24  # elements widened to fp64 at a time
_DOUBT = 1e-9  # a BLAS product in fp64 is closer than this to the defined one

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


def fixed_order_sum(terms: Matrix) -> Vector:
    """[N, d] -> [N], summed in the order that csrc/isa/cosine_knn.hpp fixes."""
    lanes = np.zeros((len(terms), _LANES))
    for start in range(0, terms.shape[1], _LANES):
        part = terms[:, start : start + _LANES]
        lanes[:, : part.shape[1]] += part
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def inverse_norms(rows: Matrix) -> Vector:
    """[N, d] -> [N]: 1 / |row|, 0 for a zero row."""
    squares = fixed_order_sum(rows * rows)
    with np.errstate(divide="ignore"):
        return np.where(squares > 0, 1 / np.sqrt(squares), 0.0)


def _slabs(rows: NDArray[Any]) -> list[slice]:
    step = max(1, _SLAB // rows.shape[1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def exact_neighbours(
    rows: NDArray[Any],
    queries: NDArray[Any],
    k: int,
    *,
    ids: ArrayLike | None = None,
    exclude: ArrayLike | None = None,
    threshold: float = -np.inf,
    allowed: ArrayLike | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What `CosineKNN(rows, ids=ids).search(queries, k, ...)` returns; `allowed` as [N] booleans.

    A BLAS product narrows the candidates; the defined sum decides among them.
    """
    queries = queries.astype(np.float64)
    names = np.arange(len(rows)) if ids is None else np.asarray(ids)
    usable = np.ones(len(rows), np.bool_) if allowed is None else np.asarray(allowed, np.bool_)
    query_scale = inverse_norms(queries)
    row_scale = np.empty(len(rows))
    rough = np.empty((len(queries), len(rows)))
    for slab in _slabs(rows):
        wide: Matrix = np.asarray(rows[slab], dtype=np.float64)
        row_scale[slab] = inverse_norms(wide)
        rough[:, slab] = (queries * query_scale[:, None]) @ (wide * row_scale[slab, None]).T
    found_ids = np.full((len(queries), k), -1, np.int64)
    found = np.full((len(queries), k), np.nan, np.float32)
    for q, query in enumerate(queries):
        mask = usable if exclude is None else usable & (names != np.asarray(exclude)[q])
        picked = np.flatnonzero(mask)
        if len(picked) > k:
            kth = np.partition(rough[q, picked], len(picked) - k)[len(picked) - k]
            picked = picked[rough[q, picked] >= kth - _DOUBT]
        products = rows[picked].astype(np.float64) * query
        scores = fixed_order_sum(products) * (query_scale[q] * row_scale[picked])
        picked, scores = picked[scores > threshold], scores[scores > threshold]
        order = np.lexsort((picked, names[picked], -scores))[:k]
        found_ids[q, : len(order)] = names[picked[order]]
        found[q, : len(order)] = scores[order]
    return found_ids, found
