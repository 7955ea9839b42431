"""What the learners make of embeddings and words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from noisy_labels import assert_counted, corpus, flipped

from robustft import crowd
from robustft.crowd import learners, neighbours
from robustft.crowd.neighbours import neighbour_vote


def test_no_record_judges_itself() -> None:
    rows, _, labels = corpus(3, 200)
    changed = labels.copy()
    changed[0] = (labels[0] + 1) % 3
    clean = np.eye(3)
    for expert in (
        lambda given: neighbour_vote(rows, given, 3)[0],
        lambda given: learners.out_of_fold(rows, given, clean),
    ):
        before, after = expert(labels)[0], expert(changed)[0]
        assert abs(before - after).max() < 0.02  # only through the label frequencies


class OnDisk:
    """A corpus whose embeddings come when they are asked for."""

    threads = 1

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.largest = rows, 0

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        self.largest = max(self.largest, len(positions))
        return self.rows[positions]

    def questions(self, positions: np.ndarray) -> Iterator[str]:
        return (f"word{number % 7}" for number in positions.tolist())


def test_a_large_corpus_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Voters are a sample, rows are gathered in chunks, and the judgement is hardly another."""
    rows, truth, labels = corpus(5, 3000)
    rows = rows.astype(np.float32)
    chosen, whole = np.arange(1, 3000), OnDisk(rows)
    expected = crowd.Learners(rows[1:], labels[1:], 3).predict(np.eye(3))
    monkeypatch.setattr(neighbours, "VOTERS", 1000)
    monkeypatch.setattr(neighbours, "_CHUNK", 512)
    for name, size in {"_WORD_ROWS": 100, "_FIT_ROWS": 1000, "_CHUNK": 512}.items():
        monkeypatch.setattr(learners, name, size)
    told: list[tuple[str, int, int]] = []
    taught = crowd.Learners.of(
        whole, chosen, labels[1:], 3, progress=lambda *step: told.append(step)
    )
    assert whole.largest == 1000
    assert told == [("neighbours", min(done, 2999), 2999) for done in range(512, 3073, 512)]
    found = taught.predict(np.eye(3))
    assert whole.largest == 1000
    assert set(found) == set(expected) == {"regression", "neighbours"}
    for name, values in found.items():
        right, more = ((v.argmax(1) == truth[1:]).mean() for v in (values, expected[name]))
        assert right > more - 0.05
    steps: list[tuple[str, int, int]] = []
    crowd.judge_labels({}, labels[1:], 3, taught, progress=lambda *step: steps.append(step))
    assert_counted([step for step in steps if step[0] != "regression"])
    assert steps[-6:] == [("regression", min(done, 2999), 2999) for done in range(512, 3073, 512)]


def test_some_records_of_learners_are_learnt_alone() -> None:
    rows, _, labels = corpus(7, 400)
    words = learners.word_features(["good news", "bad news", "no news"][label] for label in labels)
    questions = np.arange(400) // 2
    whole = crowd.Learners(rows, labels, 3, words, questions=questions)
    everything = whole.sample(np.arange(400))
    for name, values in whole.predict(np.eye(3)).items():
        np.testing.assert_array_equal(everything.predict(np.eye(3))[name], values)
    chosen = np.flatnonzero(labels != 1)
    two = whole.sample(chosen, (0, 2)).predict(np.eye(2))
    assert two["neighbours"].shape == (len(chosen), 2)
    np.testing.assert_allclose(two["neighbours"].sum(1), 1.0)
    alone = learners.out_of_fold(
        rows[chosen], labels[chosen] // 2, np.eye(2), questions=questions[chosen]
    )
    np.testing.assert_array_equal(two["regression"], alone)


def test_copies_of_a_record_do_not_judge_each_other() -> None:
    rows, truth, labels = corpus(6, 500)
    questions = np.arange(500) % 400  # the first hundred are asked twice, with the same label
    rows, truth, labels = rows[questions], truth[questions], labels[questions]
    wrong = labels != truth
    once = crowd.judge_labels({}, labels[:400], 3, crowd.Learners(rows[:400], labels[:400], 3))
    told = crowd.Learners(rows, labels, 3, questions=questions * 7)
    found = crowd.judge_labels({}, labels, 3, told)
    assert found.noise_rate is not None
    assert abs(found.noise_rate.value - wrong.mean()) < 0.05
    caught = (found.wrong > 0.5)[wrong].mean()
    assert caught > (once.wrong > 0.5)[wrong[:400]].mean() - 0.05
    changed = labels.copy()
    changed[[3, 403]] = (labels[3] + 1) % 3  # record 3 and its copy
    for expert in (
        lambda given: neighbour_vote(rows, given, 3, questions=questions)[0],
        lambda given: learners.out_of_fold(rows, given, np.eye(3), questions=questions),
    ):
        assert abs(expert(labels)[3] - expert(changed)[3]).max() < 0.06


def test_words_of_copies_count_once() -> None:
    texts = ["one two", "three four", "one two"]
    assert learners.word_features(texts, np.array([5, 9, 5])) is None
    assert learners.word_features(texts) is not None


def test_the_regression_without_noise_is_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression

    rows, _, labels = corpus(4, 300)
    weights = learners.fit_regression(rows, labels, np.eye(3))
    peer = LogisticRegression(C=1.0, max_iter=1000).fit(rows, labels)
    ours = learners.softmax(rows @ weights[:, :-1].T + weights[:, -1])
    np.testing.assert_allclose(ours, peer.predict_proba(rows), atol=1e-2)


def test_word_features_leave_out_words_of_one_text() -> None:
    assert learners.word_features(["one two", "three four"]) is None
    found = learners.word_features(["sales rose", "sales fell", "profit 😀 rose"])
    assert found is not None
    assert found.shape == (3, 2)
    np.testing.assert_allclose(np.sqrt(found.multiply(found).sum(1)), 1.0)
    texts = ["sales rose", "sales fell", "sales stood", "profit rose"]
    fewer = learners.word_features(texts, most=2)
    assert fewer is not None
    assert sorted(np.asarray((fewer != 0).sum(0)).ravel().tolist()) == [2, 3]


def test_a_rare_label_is_not_wrong_for_being_rare() -> None:
    """Weak learners know little more of it than that; most of its right answers stay clean."""
    spared = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        truth = rng.choice(3, 150, p=[0.1, 0.6, 0.3])
        rows = np.eye(3, 16)[truth] + 0.35 * rng.normal(size=(150, 16))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        labels = flipped(truth, 0.3, 3, rng)
        found = crowd.judge_labels({}, labels, 3, crowd.Learners(rows, labels, 3))
        spared.append((found.wrong[(labels == 0) & (truth == 0)] < 0.5).mean())
    assert np.mean(spared) > 0.7, spared
