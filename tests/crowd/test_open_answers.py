"""Open answers, judged by who agrees with whom."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from noisy_labels import auroc

from robustft import crowd
from robustft.crowd import open_answers


@pytest.mark.parametrize(
    ("said", "kind", "expected"),
    [
        (["18", "18.0", "17", "$18"], "number", [0, 0, 1, 0]),
        (["The cat", None, "cat", None, "dog"], "span", [0, -1, 0, -1, 1]),
        (["so 9 #### 18", "we get\n#### 18", "#### 17"], "text", [0, 0, 1]),
        (["b c d e f g h i", "b c d e p q r s", "p q r s t u v w"], "text", [0, 0, 0]),
        (["b c d e f g h i", "p q r s t u v w"], "text", [0, 1]),
    ],
)
def test_partition(said: list[str | None], kind: str, expected: list[int]) -> None:
    assert crowd.partition(said, kind) == expected  # type: ignore[arg-type]


def witnesses(
    seed: int, accuracies: list[float], count: int = 2000, wrong_answers: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """Partitions of K answers a question, and whether the first is wrong."""
    rng = np.random.default_rng(seed)
    right = rng.random((count, len(accuracies))) < accuracies
    answers = np.where(right, 0, 1 + rng.integers(wrong_answers, size=right.shape))
    partitions = [
        [row.tolist().index(value) for value in row] for row in answers
    ]  # each answer is named by its first speaker
    renumbered = [[sorted(set(row)).index(value) for value in row] for row in partitions]
    return np.array(renumbered), ~right[:, 0]


def test_open_answers_are_judged_without_truth() -> None:
    partitions, wrong = witnesses(0, [0.6, 0.4, 0.8, 0.7])
    found = crowd.judge_partitions(partitions, ["weak", "strong", "middling"])
    weights = found.weights
    assert weights["weak"] < weights["middling"] < weights["strong"]
    agreement = (partitions[:, 1:] == partitions[:, :1]).mean(1)
    assert auroc(wrong, found.wrong) > auroc(wrong, -agreement) + 0.005
    assert found.noise_rate is not None
    assert abs(found.noise_rate.value - wrong.mean()) < 0.05
    bins = np.digitize(found.wrong, np.linspace(0, 1, 11))
    error = sum(abs(found.wrong[bins == b].sum() - wrong[bins == b].sum()) for b in np.unique(bins))
    assert error / len(wrong) < 0.06


def test_beside_one_weak_witness_given_answers_are_believed() -> None:
    partitions, _ = witnesses(1, [0.9, 0.1])
    found = crowd.judge_partitions(partitions, ["model"])
    assert (found.wrong < 0.5).all()
    assert found.noise_rate is not None
    assert found.noise_rate.high - found.noise_rate.low > 0.1


@pytest.mark.parametrize("count", [60, 660, 5000])
@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2, 0.3, 0.6, 0.9, 1.0])
def test_an_answer_that_the_only_other_witness_shares_is_never_the_likelier_error(
    share: float, count: int
) -> None:
    partitions = np.zeros((count, 2), np.int64)
    partitions[round(share * count) :, 1] = 1
    found = crowd.judge_partitions(partitions, ["model"])
    if found.powerless:
        assert share <= 0.05
        assert len(set(found.wrong.tolist())) == 1
    elif share < 1.0:
        assert found.wrong[0] < found.wrong[-1]


@pytest.mark.parametrize(
    "accuracies", [(0.9, 0.2, 0.1), (0.9, 0.4, 0.3), (0.8, 0.3, 0.2), (0.7, 0.5, 0.3)]
)
def test_two_weak_witnesses_do_not_outvote_good_answers(accuracies: tuple[float, ...]) -> None:
    partitions, wrong = witnesses(3, list(accuracies), 1000)
    found = crowd.judge_partitions(partitions, ["a", "b"])
    assert not (found.wrong > 0.5).any()
    assert found.noise_rate is not None
    assert found.noise_rate.low < wrong.mean() < found.noise_rate.high


@pytest.mark.parametrize("accuracies", [(0.9, 0.9, 0.9), (0.7, 0.8, 0.8), (0.3, 0.6, 0.6)])
def test_two_good_witnesses_find_wrong_answers(accuracies: tuple[float, ...]) -> None:
    partitions, wrong = witnesses(3, list(accuracies), 1000)
    noisy = crowd.judge_partitions(partitions, ["a", "b"]).wrong > 0.5
    assert (noisy & wrong).sum() / noisy.sum() > 0.75
    assert (noisy & wrong).sum() / wrong.sum() > 0.9


def test_a_copy_of_a_witness_is_told_from_one_that_agrees() -> None:
    found, _ = witnesses(0, [0.7, 0.95, 0.95, 0.5])
    assert crowd.copies(found) == {}
    twice = crowd.renumbered(found[:, [0, 3, 1, 3, 2, 1]])
    assert crowd.copies(twice) == {3: 1, 5: 2}
    assert crowd.copies(twice[:20]) == {}
    assert (crowd.renumbered(twice[:, [0, 2, 4, 1]]) == found).all()
    silent = twice.copy()
    silent[: len(silent) // 2, 3] = silent[: len(silent) // 4, 1] = -1
    assert crowd.copies(silent) == {3: 1, 5: 2}
    assert crowd.renumbered(np.array([[0, -1, 2, -1, 1, 2]])).tolist() == [[0, -1, 1, -1, 2, 1]]


@pytest.mark.parametrize("counts", [[827, 65, 57, 17, 34], [776, 70, 52, 57, 45]])
def test_where_all_are_good_few_are_wrong(counts: list[int]) -> None:
    """Partitions of three witnesses right 9 times in 10 or more, on easy and hard questions."""
    patterns = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    partitions = np.repeat(patterns, counts, axis=0)
    found = crowd.judge_partitions(partitions, ["a", "b"])
    assert found.noise_rate is not None
    assert found.noise_rate.high < 0.15
    shared = (partitions[:, 1:] == 0).any(1)
    assert (found.wrong[shared] < 0.5).all()
    assert (found.wrong[(partitions == [0, 1, 1]).all(1)] > 0.5).all()


def test_no_answer_is_not_a_wrong_one() -> None:
    partitions, wrong = witnesses(5, [0.7, 0.6, 0.7], 3000)
    every = crowd.judge_partitions(partitions, ["a", "b"])
    partitions[:, 1:][np.random.default_rng(0).random((3000, 2)) < 0.3] = -1
    found = crowd.judge_partitions(partitions, ["a", "b"])
    assert found.noise_rate is not None
    assert every.noise_rate is not None
    assert abs(found.noise_rate.value - every.noise_rate.value) < 0.05
    told = [((one.wrong > 0.5) & wrong).sum() / wrong.sum() for one in (found, every)]
    assert told[0] > told[1] - 0.3


def test_the_gradient_where_some_are_silent() -> None:
    partitions, _ = witnesses(6, [0.5, 0.6, 0.3], 100, 3)
    partitions[:, 1:][np.random.default_rng(0).random((100, 2)) < 0.3] = -1
    patterns = open_answers._Patterns(partitions, np.ones(100))
    at = np.array([0.3, -0.4, 0.8, 0.2, 1.0, 0.4])
    gradient = open_answers._evaluate(at, patterns)[1]
    for k, step in enumerate(1e-5 * np.eye(len(at))):
        ahead, behind = (open_answers._evaluate(at + s, patterns)[0] for s in (step, -step))
        assert math.isclose(gradient[k], (ahead - behind) / 2e-5, rel_tol=1e-4, abs_tol=1e-4)


def test_a_witness_that_is_often_silent_does_not_upset_the_search() -> None:
    partitions, _ = witnesses(4, [0.7, 0.6, 0.7], 500)
    partitions[np.random.default_rng(0).random(500) < 0.9, 2] = -1
    with np.errstate(all="raise", under="ignore"):
        found = crowd.judge_partitions(partitions, ["a", "b"])
    assert not found.powerless


@pytest.mark.parametrize("others", [1, 3, 5])
def test_where_all_agree_nothing_is_wrong(others: int) -> None:
    partitions = np.zeros((200_000, 1 + others), np.int64)
    with np.errstate(all="raise", under="ignore"):
        found = crowd.judge_partitions(partitions, list("abcde"[:others]))
    assert found.noise_rate is not None
    assert 0 <= found.noise_rate.low <= found.noise_rate.value <= found.noise_rate.high < 1e-4


def test_peaks_of_one_height_all_count() -> None:
    partitions = np.repeat(
        [[0, 1, 0], [0, 0, 1], [0, 1, 2], [0, 0, 0], [0, 1, 1]], [40, 40, 60, 20, 5], axis=0
    )
    found = crowd.judge_partitions(partitions, ["a", "b"])
    assert abs(found.weights["a"] - found.weights["b"]) < 0.02
    assert abs(found.wrong[0] - found.wrong[40]) < 0.02


def test_no_agreement_is_powerless() -> None:
    found = crowd.judge_partitions(np.tile([0, 1, 2], (50, 1)), ["a", "b"])
    assert found.powerless
    assert found.noise_rate is None


def test_the_gradient_of_the_open_model() -> None:
    partitions, _ = witnesses(2, [0.5, 0.6, 0.3, 0.8], 200, 3)
    patterns = open_answers._Patterns(partitions, np.ones(len(partitions)))
    at = np.array([0.3, -0.4, 0.8, 0.1, 0.2, 1.0, 0.4])
    _, gradient, _, _ = open_answers._evaluate(at, patterns)
    for k in range(len(at)):
        step = np.zeros(len(at))
        step[k] = 1e-5
        ahead = open_answers._evaluate(at + step, patterns)[0]
        behind = open_answers._evaluate(at - step, patterns)[0]
        assert math.isclose(gradient[k], (ahead - behind) / 2e-5, rel_tol=1e-4, abs_tol=1e-4)


def test_partition_probabilities_sum_to_one() -> None:
    every = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 1, 2]])
    patterns = open_answers._Patterns(every, np.ones(5))
    at = np.array([0.3, -0.4, 0.8, 0.2, 1.0, 0.4])
    total = 0.0
    for row in range(5):
        one = open_answers._Patterns(every[row : row + 1], np.ones(1))
        total += math.exp(open_answers._evaluate(at, one)[0])
    assert math.isclose(total, 1.0, rel_tol=1e-9)
    right = open_answers._evaluate(at, patterns)[2]
    assert all(0 < value < 1 for value in right)
    assert all(a != b for a, b in pairwise(right))
