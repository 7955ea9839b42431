"""Noise that scattered errors and single rules do not describe."""

from __future__ import annotations

import numpy as np
import pytest
from noisy_labels import unit

from robustft import crowd
from robustft.crowd.learners import softmax


def weakly_labelled(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """True labels, those of a weak model, embeddings that tell the latter, a strong model's word.

    As a regression on 60 records of the Financial PhraseBank labels the others.
    """
    rules = np.array([[0.33, 0.14, 0.53], [0.0, 0.945, 0.055], [0.05, 0.31, 0.64]])
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, size=1500, p=[0.13, 0.62, 0.25])
    labels = (rng.random((1500, 1)) > rules[truth].cumsum(1)).sum(1)
    rows = unit(3 * unit(rng.normal(size=(3, 32)))[labels] + 0.3 * rng.normal(size=(1500, 32)))
    opinions = softmax(2.5 * (2.0 * np.eye(3)[truth] + rng.normal(size=(1500, 3))))
    return truth, labels, rows, opinions


def assert_found(found: crowd.Judgement, wrong: np.ndarray) -> None:
    assert found.noise_rate is not None
    assert abs(found.noise_rate.value - wrong.mean()) < 0.05
    flagged = found.wrong > 0.5
    assert wrong[flagged].mean() > 0.75
    assert flagged[wrong].mean() > 0.75


@pytest.mark.parametrize("seed", range(3))
def test_a_strong_model_sees_labels_that_go_wrong_by_many_rules(seed: int) -> None:
    truth, labels, _, opinions = weakly_labelled(seed)
    found = crowd.judge_labels({"model": opinions}, labels, 3, alike=True)
    assert_found(found, labels != truth)


def test_learners_side_with_a_weak_model_and_the_strong_one_is_told_apart() -> None:
    truth, labels, rows, opinions = weakly_labelled(0)
    found = crowd.judge_labels({"model": opinions}, labels, 3, crowd.Learners(rows, labels, 3))
    assert found.noise_rate is not None
    assert found.noise_rate.high < 0.05
    assert found.rate_by_panel is not None
    assert abs(found.rate_by_panel.value - (labels != truth).mean()) < 0.05


@pytest.mark.parametrize("others", [[8] * 8, [2] * 20, [30] * 10])
def test_labels_in_order_do_not_hide_others_that_are_taken_for_each_other(
    others: list[int],
) -> None:
    rng = np.random.default_rng(5)
    classes = 3 + len(others)
    centres = unit(rng.normal(size=(classes, 64)))
    truth = np.repeat(np.arange(classes), [200] * 3 + others)
    rows = unit(3 * centres[truth] + 0.3 * rng.normal(size=(len(truth), 64)))
    labels, chosen = truth.copy(), rng.choice(600, 100, replace=False)
    labels[chosen] = (truth[chosen] + rng.integers(1, 3, 100)) % 3
    found = crowd.judge_labels({}, labels, classes, crowd.Learners(rows, labels, classes))
    assert_found(found, labels != truth)
