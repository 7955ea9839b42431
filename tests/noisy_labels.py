"""Corpora with wrong labels, experts who are right as often as they are told to be, progress."""

from __future__ import annotations

import itertools

import numpy as np


def auroc(wrong: np.ndarray, score: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(wrong, score))


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def corpus(
    seed: int, count: int = 400, rate: float = 0.3, classes: int = 3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clustered unit rows, true labels, and given labels wrong at `rate`."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=count)
    centres = rng.normal(size=(classes, 16))
    rows = unit(centres[truth] + 0.6 * rng.normal(size=(count, 16)))
    return rows, truth, flipped(truth, rate, classes, rng)


def flipped(truth: np.ndarray, rate: float, classes: int, rng: np.random.Generator) -> np.ndarray:
    wrong = rng.random(len(truth)) < rate
    others = (truth + rng.integers(1, classes, size=len(truth))) % classes
    return np.where(wrong, others, truth)


def opinions(
    truth: np.ndarray, accuracy: float, classes: int, rng: np.random.Generator
) -> np.ndarray:
    """[N, C] an expert sure of an answer that is right at `accuracy`."""
    said = flipped(truth, 1.0 - accuracy, classes, rng)
    return np.eye(classes)[said] * 0.8 + 0.2 / classes


def assert_counted(steps: list[tuple[str, int, int]]) -> None:
    """Every stage of the progress counts from 1 to its total at most."""
    for _, stage in itertools.groupby(steps, key=lambda step: step[0]):
        done, totals = zip(*((step[1], step[2]) for step in stage), strict=True)
        assert done == tuple(range(1, len(done) + 1))
        assert len(set(totals)) == 1
        assert done[-1] <= totals[0]
