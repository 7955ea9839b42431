from __future__ import annotations

import numpy as np
import pytest
from noisy_labels import opinions, unit

from robustft import crowd
from robustft.crowd import labels as crowd_of_labels
from robustft.crowd import neighbours
from robustft.crowd.neighbours import near_copies
from robustft.crowd.pool import Noise


def corpus(count: int, rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clustered unit rows, true labels, and given labels wrong at `rate`."""
    rng = np.random.default_rng(3)
    truth = rng.integers(3, size=count)
    rows = 3 * unit(rng.normal(size=(3, 32)))[truth] + 0.6 * rng.normal(size=(count, 32))
    wrong = rng.random(count) < rate
    return unit(rows), truth, np.where(wrong, (truth + rng.integers(1, 3, count)) % 3, truth)


def copied(rows: np.ndarray, times: int, much: float = 0.01) -> np.ndarray:
    """The rows `times` over, each slightly different."""
    rng = np.random.default_rng(4)
    whole = np.tile(rows, (times, 1))
    return unit(whole + much * rng.normal(size=whole.shape))


@pytest.mark.parametrize("times", [2, 5, 40])
def test_an_error_copied_with_its_text_does_not_confirm_itself(times: int) -> None:
    rows, truth, labels = corpus(300, 0.3)
    rows, truth, labels = copied(rows, times), np.tile(truth, times), np.tile(labels, times)
    found = crowd.judge_labels({}, labels, 3, crowd.Learners(rows, labels, 3, threads=1))
    wrong, flagged = labels != truth, found.wrong > 0.5
    assert found.noise_rate is not None
    assert abs(found.noise_rate.value - wrong.mean()) < 0.05
    assert wrong[flagged].mean() > 0.95
    assert flagged[wrong].mean() > 0.9


@pytest.mark.parametrize("times", [2, 10])
def test_nor_in_a_corpus_of_more_questions_than_have_a_vote(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, truth, labels = corpus(600, 0.3)
    rows, truth, labels = copied(rows, times), np.tile(truth, times), np.tile(labels, times)
    monkeypatch.setattr(neighbours, "VOTERS", 900 if times == 2 else 3000)
    taught = crowd.Learners(rows, labels, 3, questions=np.arange(len(rows)), threads=1)
    assert taught.taught is not None
    found = crowd.judge_labels({}, labels, 3, taught)
    wrong, flagged = labels != truth, found.wrong > 0.5
    assert found.noise_rate is not None
    assert abs(found.noise_rate.value - wrong.mean()) < 0.05
    assert wrong[flagged].mean() > 0.95
    assert flagged[wrong].mean() > 0.9


def test_a_record_without_a_vote_does_not_hear_its_copy() -> None:
    rows, _, labels = corpus(300, 0.3)
    twice = copied(rows, 2)
    some = np.arange(300)
    votes, asks = neighbours.neighbour_vote(
        twice, np.tile(labels, 2), 3, voters=some, joining=True, threads=1
    )
    assert np.array_equal(asks, np.tile(some, 2))
    changed = np.tile(labels, 2)
    changed[[3, 303]] = (labels[3] + 1) % 3
    other, _ = neighbours.neighbour_vote(twice, changed, 3, voters=some, joining=True, threads=1)
    assert abs(votes[303] - other[303]).max() < 0.02
    apart, asks = neighbours.neighbour_vote(twice, changed, 3, voters=some, threads=1)
    assert (asks[300:] == -1).all()
    assert abs(apart[303] - other[303]).max() > 0.02


@pytest.mark.parametrize("learning", [True, False])
def test_what_some_records_tell_of_the_noise_holds_for_all(
    learning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, truth, labels = corpus(3000, 0.3)
    panel = {"model": opinions(truth, 0.7, 3, np.random.default_rng(0))}
    learners = crowd.Learners(rows, labels, 3, threads=1) if learning else None
    whole = crowd.judge_labels(panel, labels, 3, learners)
    monkeypatch.setattr(crowd_of_labels, "_TELLING", 1000)
    steps: list[tuple[str, int, int]] = []
    some = crowd.judge_labels(panel, labels, 3, learners, progress=lambda *step: steps.append(step))
    assert whole.noise_rate is not None
    assert some.noise_rate is not None
    assert abs(some.noise_rate.value - whole.noise_rate.value) < 0.03
    assert some.labels is not None
    assert some.labels.shape == (3000, 3)
    assert ((some.wrong > 0.5) == (whole.wrong > 0.5)).mean() > 0.98
    assert set(some.learned) == set(whole.learned)
    assert all(len(values) == 3000 for values in some.learned.values())
    if learning:
        assert steps[-1][1:] == (3000, 3000)


def test_near_copies_are_one_question_and_others_stay_apart() -> None:
    rows, _, labels = corpus(100, 0.3)
    numbers = near_copies(copied(rows, 40), np.tile(labels, 40), threads=1)
    assert numbers is not None
    assert np.array_equal(numbers, np.tile(numbers[:100], 40))
    assert len(set(numbers[:100].tolist())) == 100
    twice = copied(rows, 2)
    thrice, questions = np.concatenate([twice, twice[100:]]), np.arange(300)
    questions[200:] = np.arange(100, 200)
    again = near_copies(thrice, np.tile(labels, 3), questions, threads=1)
    assert again is not None
    assert np.array_equal(again, np.tile(again[:100], 3))


def test_near_copies_that_were_labelled_one_by_one_teach_each_other() -> None:
    rows, truth, first = corpus(300, 0.3)
    rng = np.random.default_rng(5)
    second = np.where(rng.random(300) < 0.3, (truth + 1) % 3, truth)
    assert near_copies(copied(rows, 2), np.concatenate([first, second]), threads=1) is None
    few = np.concatenate([rows, copied(rows[:5], 1)])
    assert near_copies(few, np.concatenate([first, first[:5]]), threads=1) is None
    questions = np.arange(300)
    assert near_copies(rows, first, questions, threads=1) is questions


def test_questions_of_one_template_are_no_copies_where_nearly_all_bear_one_label() -> None:
    rng = np.random.default_rng(6)
    template, topic = rng.normal(size=(2, 64))
    truth = (rng.random(600) < 0.03).astype(np.int64)
    rows = unit(template + 0.06 * topic * truth[:, None] + 0.02 * rng.normal(size=(600, 64)))
    assert (rows @ rows.T).min() > 0.98
    labels = np.where(rng.random(600) < 0.01, 1 - truth, truth)
    assert near_copies(rows, labels, threads=1) is None
    found = crowd.judge_labels({}, labels, 2, crowd.Learners(rows, labels, 2, threads=1))
    assert found.noise_rate is not None
    assert sum(found.weights.values()) > 0.99


def test_labels_given_once_do_not_hide_what_is_wrong_with_the_others() -> None:
    rng = np.random.default_rng(5)
    centres = unit(rng.normal(size=(11, 64)))
    truth = np.repeat(np.arange(11), [200] * 3 + [1] * 8)
    rows = unit(3 * centres[truth] + 0.3 * rng.normal(size=(len(truth), 64)))
    labels, chosen = truth.copy(), rng.choice(600, 100, replace=False)
    labels[chosen] = (truth[chosen] + rng.integers(1, 3, 100)) % 3
    found = crowd.judge_labels({}, labels, 11, crowd.Learners(rows, labels, 11, threads=1))
    wrong, flagged = labels != truth, found.wrong > 0.5
    assert found.noise_rate is not None
    assert abs(found.noise_rate.value - wrong.mean()) < 0.03
    assert wrong[flagged].mean() > 0.9
    assert flagged[wrong].mean() > 0.9


def test_noise_that_is_possible_is_even_where_no_label_is_rare() -> None:
    even = Noise.even(0.2, 3).spread
    assert np.array_equal(Noise.possible(0.2, np.array([0.6, 0.3, 0.1])).spread, even)
    spread = Noise.possible(0.2, np.array([0.69, 0.3, 0.01])).spread
    assert np.allclose(spread.sum(1), 1.0)
    assert spread[0, 2] < 0.1 < 0.9 < spread[0, 1]
    assert np.array_equal(Noise.possible(0.2, np.array([1.0, 0.0])).spread[0], [0.0, 0.0])
    assert Noise.possible(0.2, np.array([1.0])).spread.tolist() == [[0.0]]
