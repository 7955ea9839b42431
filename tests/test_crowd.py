from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustft import crowd
from robustft.retrieval import CosineKNN


def corpus(
    seed: int, count: int = 400, rate: float = 0.3, classes: int = 3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clustered unit rows, true labels, and given labels wrong at `rate`."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=count)
    centres = rng.normal(size=(classes, 16))
    rows = centres[truth] + 0.6 * rng.normal(size=(count, 16))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    wrong = rng.random(count) < rate
    labels = np.where(wrong, (truth + rng.integers(1, classes, size=count)) % classes, truth)
    return rows.astype(np.float32), truth, labels


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_the_crowd_finds_wrong_labels_without_truth(rate: float) -> None:
    from sklearn.metrics import roc_auc_score

    rows, truth, labels = corpus(1, rate=rate)
    experts = {
        "regression": crowd.regression_expert(rows, labels, 3),
        "neighbours": crowd.neighbour_expert(CosineKNN(rows), labels, 3),
    }
    found = crowd.pool(experts, labels, 3)
    assert roc_auc_score(labels != truth, found.doubt(labels)) > 0.9
    assert (found.probabilities.argmax(1) == truth).mean() > 0.9


def test_an_expert_at_chance_is_muted() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=500)
    found = crowd.pool({"noise": rng.dirichlet(np.ones(3), size=500)}, labels, 3)
    assert found.weights == {"noise": 0.0}
    good = np.eye(3)[labels] * 0.8 + 0.2 / 3
    both = crowd.pool({"noise": rng.dirichlet(np.ones(3), size=500), "good": good}, labels, 3)
    assert both.weights == {"noise": 0.0, "good": 1.0}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 9))
def test_probabilities_are_probabilities(count: int, classes: int, seed: int) -> None:
    rows, _, labels = corpus(seed, count, 0.4, classes)
    experts = {
        "regression": crowd.regression_expert(rows, labels, classes),
        "neighbours": crowd.neighbour_expert(CosineKNN(rows), labels, classes),
    }
    for values in (*experts.values(), crowd.pool(experts, labels, classes).probabilities):
        assert values.shape == (count, classes)
        assert np.isfinite(values).all()
        assert (values >= 0).all()
        np.testing.assert_allclose(values.sum(1), 1.0, atol=1e-6)


def test_no_record_judges_itself() -> None:
    rows, _, labels = corpus(3, 200)
    changed = labels.copy()
    changed[0] = (labels[0] + 1) % 3
    for expert in (
        lambda given: crowd.neighbour_expert(CosineKNN(rows), given, 3),
        lambda given: crowd.regression_expert(rows, given, 3),
    ):
        before, after = expert(labels)[0], expert(changed)[0]
        assert abs(before - after).max() < 0.02  # only through the label frequencies


def test_one_label_only() -> None:
    rows, _, _ = corpus(0, 30)
    labels = np.zeros(30, dtype=np.int64)
    found = crowd.pool({"regression": crowd.regression_expert(rows, labels, 3)}, labels, 3)
    assert (found.doubt(labels) < 1e-9).all()
