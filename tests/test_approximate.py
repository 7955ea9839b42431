from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from robustft.errors import UserError
from robustft.retrieval import CosineKNN
from robustft.retrieval.approximate import ApproximateKNN, require_retriever


def clustered(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((50, 48), np.float32)
    return centres[rng.integers(50, size=count)] + rng.standard_normal((count, 48), np.float32)


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, expected, strict=True)]
    return sum(hits) / expected.size


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs faiss.*pip install 'robustft\[approximate\]'"):
        require_retriever("approximate")
    require_retriever("exact")


def test_most_neighbours_are_found() -> None:
    pytest.importorskip("faiss")
    rows, queries = clustered(5000, 1), clustered(200, 2)
    index, exact = ApproximateKNN([rows[:1000], rows[1000:]], threads=2), CosineKNN(rows)
    assert len(index) == 5000
    expected, cosines = exact.search(queries, 10)
    ids, near = index.search(queries, 10)
    assert recall(ids, expected) > 0.95
    assert ids.dtype == np.int64
    assert near.dtype == np.float32
    np.testing.assert_allclose(near[ids == expected], cosines[ids == expected], atol=2e-3)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_only_allowed_rows_are_found(share: float) -> None:
    pytest.importorskip("faiss")
    rows, queries = clustered(5000, 1), clustered(200, 2)
    allowed = np.random.default_rng(3).random(5000) < share
    ids, _ = ApproximateKNN([rows]).search(queries, 5, allowed=allowed)
    assert allowed[ids].all()
    assert recall(ids, CosineKNN(rows).search(queries, 5, allowed=allowed)[0]) > 0.9


def test_missing_neighbours_are_padded() -> None:
    pytest.importorskip("faiss")
    rows = np.ones((3, 8), np.float32)
    index = ApproximateKNN([rows])
    ids, cosines = index.search(rows[:1], 5, allowed=np.array([True, False, True]))
    assert sorted(ids[0].tolist()) == [-1, -1, -1, 0, 2]
    assert np.isnan(cosines[0]).tolist() == [False, False, True, True, True]
