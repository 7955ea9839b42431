"""Exact cosine kNN by robustft and by its peers, behind one call; see `knn`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustft.retrieval import CosineKNN

_CHUNK = 1 << 28  # bytes of scores a peer that keeps them all may hold at a time
_PAIRS = 1 << 29  # queries times rows that the slower of our own filters is given

Floats = NDArray[np.float32]
Found = tuple[Any, Any]  # ids [Q, k], cosines [Q, k]


@dataclass(frozen=True, slots=True)
class Case:
    """One corpus, one way to ask it."""

    kind: str
    rows: int
    dim: int
    queries: int
    k: int
    threads: int

    def __str__(self) -> str:
        return f"{self.kind} N={self.rows} d={self.dim} Q={self.queries} k={self.k}"


@dataclass(frozen=True, slots=True)
class Contender:
    """`call(queries)` answers [q, d] queries; slow ones are given only the first `most`."""

    name: str
    call: Callable[[Floats], Found]
    most: int = 1 << 30


def unit_rows(rows: Floats) -> Floats:
    """[N, d] rows of unit length, for those who do not normalise them."""
    out = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return np.ascontiguousarray(out, np.float32)


def _ours(rows: Floats, case: Case, tier: str) -> Contender:
    index = CosineKNN(rows, threads=case.threads)
    index._tier = tier
    name, most = "robustft", 1 << 30
    if tier != "auto":
        name, most = f"robustft, {tier} filter only", max(64, _PAIRS // case.rows)
    return Contender(name, lambda queries: index.search(queries, case.k), most)


def _faiss(rows: Floats, case: Case) -> Iterator[Contender]:
    import faiss

    faiss.omp_set_num_threads(case.threads)
    index = faiss.IndexFlatIP(case.dim)
    index.add(rows)

    def search(queries: Floats) -> Found:
        cosines, ids = index.search(queries, case.k)
        return ids, cosines

    def search_by_blas(queries: Floats) -> Found:
        usual = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = 0
        try:
            return search(queries)
        finally:
            faiss.cvar.distance_compute_blas_threshold = usual

    yield Contender("faiss IndexFlatIP", search)
    if case.queries < 4096:  # from there on BLAS is its own choice
        yield Contender("faiss IndexFlatIP, BLAS forced", search_by_blas)


def _usearch(rows: Floats, case: Case) -> Iterator[Contender]:
    from usearch.index import search

    def run(queries: Floats) -> Found:
        found = search(rows, queries, case.k, "cos", exact=True, threads=case.threads)
        keys, distances = np.asarray(found.keys), np.asarray(found.distances)
        return keys.reshape(len(queries), -1), 1 - distances.reshape(len(queries), -1)

    yield Contender("usearch exact", run, most=max(1, min(256, _CHUNK // (4 * case.rows))))


def _sklearn(rows: Floats, case: Case) -> Iterator[Contender]:
    import sklearn
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=case.k, algorithm="brute", metric="cosine")
    index.fit(rows)

    def run(queries: Floats) -> Found:
        with sklearn.config_context(working_memory=_CHUNK >> 20):
            distances, ids = index.kneighbors(queries)
        return ids, 1 - distances

    yield Contender("scikit-learn brute", run, most=512)


def _numpy(rows: Floats, case: Case) -> Iterator[Contender]:
    def some(queries: Floats) -> Found:
        scores = queries @ rows.T
        best = np.argpartition(scores, -case.k, axis=1)[:, -case.k :]
        cosines = np.take_along_axis(scores, best, 1)
        order = np.argsort(-cosines, axis=1, kind="stable")
        return np.take_along_axis(best, order, 1), np.take_along_axis(cosines, order, 1)

    yield Contender("numpy matmul, argpartition", _in_chunks(some, case), most=512)


def _torch(rows: Floats, case: Case) -> Iterator[Contender]:
    import torch

    torch.set_num_threads(case.threads)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.from_numpy(rows).to(dtype).T

        def some(
            queries: Floats, matrix: torch.Tensor = matrix, dtype: torch.dtype = dtype
        ) -> Found:
            with torch.inference_mode():
                found = (torch.from_numpy(queries).to(dtype) @ matrix).topk(case.k)
            return found.indices.numpy(), found.values.float().numpy()

        yield Contender(f"torch matmul, topk {name}", _in_chunks(some, case), most=1024)


def _in_chunks(some: Callable[[Floats], Found], case: Case) -> Callable[[Floats], Found]:
    step = max(1, _CHUNK // (4 * case.rows))

    def run(queries: Floats) -> Found:
        parts = [some(queries[i : i + step]) for i in range(0, len(queries), step)]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    return run


PEERS: dict[str, Callable[[Floats, Case], Iterator[Contender]]] = {  # by the module they need
    "faiss": _faiss,
    "usearch": _usearch,
    "sklearn": _sklearn,
    "numpy": _numpy,
    "torch": _torch,
}


def contenders(rows: Floats, case: Case, peers: Sequence[str]) -> Iterator[Contender]:
    """Made one at a time: each may hold a copy of the rows."""
    yield _ours(rows, case, "auto")
    yield _ours(rows, case, "float32")
    unit = unit_rows(rows)
    for module in peers:
        if module in PEERS and importlib.util.find_spec(module):
            yield from PEERS[module](unit, case)
