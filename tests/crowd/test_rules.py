"""Wrong labels that follow a rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_labels import assert_counted, corpus, opinions

from robustft import crowd
from robustft.crowd import labels as crowd_of_labels
from robustft.crowd import pool
from robustft.crowd.judgement import Floats
from robustft.crowd.pool import Given, Noise


def turned(
    labels: np.ndarray, truth: np.ndarray, right: int, wrong: int, share: float, seed: int = 0
) -> np.ndarray:
    """A share of the records that are truly `right` is given as `wrong`."""
    rng = np.random.default_rng(seed)
    some = rng.permutation(np.flatnonzero(truth == right))
    labels = labels.copy()
    labels[some[: round(share * len(some))]] = wrong
    return labels


def assert_found(found: crowd.Judgement, wrong: np.ndarray, least: float = 0.85) -> None:
    """Wrong labels are found, and nearly nothing else; the rate is right."""
    flagged = found.wrong > 0.5
    assert wrong[flagged].mean() > least
    assert flagged[wrong].mean() > least
    assert found.noise_rate is not None
    assert abs(found.noise_rate.value - wrong.mean()) < 0.05


@pytest.mark.parametrize(("right", "wrong"), [(0, 1), (1, 0), (2, 1)])
@pytest.mark.parametrize("share", [0.2, 0.45])
def test_a_label_often_given_for_another_is_found(right: int, wrong: int, share: float) -> None:
    rows, truth, _ = corpus(11, 600)
    labels = turned(truth, truth, right, wrong, share)
    found = crowd.judge_labels({}, labels, 3, crowd.Learners(rows, labels, 3))
    assert_found(found, labels != truth)
    assert found.labels is not None
    flagged = found.wrong > 0.5
    assert (found.labels.argmax(1) == right)[flagged].mean() > 0.95


def test_several_rules_are_found_beside_scattered_errors() -> None:
    rows, truth, scattered = corpus(12, 1500, 0.1, 5)
    labels = turned(turned(scattered, truth, 0, 1, 0.4), truth, 3, 2, 0.3)
    found = crowd.judge_labels({}, labels, 5, crowd.Learners(rows, labels, 5))
    assert_found(found, labels != truth)


def test_one_strong_model_tells_of_a_rule_and_two_labels_suffice() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=1000)
    labels = turned(truth, truth, 0, 1, 0.4)
    alone = crowd.judge_labels({"model": opinions(truth, 0.95, 3, rng)}, labels, 3)
    assert_found(alone, labels != truth, least=0.7)
    rows, truth, _ = corpus(13, 600, 0.0, 2)
    labels = turned(truth, truth, 1, 0, 0.4)
    assert_found(
        crowd.judge_labels({}, labels, 2, crowd.Learners(rows, labels, 2)), labels != truth
    )


def test_rules_that_hide_each_other_are_found_together() -> None:
    """Every label goes wrong in a way of its own."""
    rows, truth, _ = corpus(16, 600)
    labels = np.where(np.random.default_rng(0).random(600) < 0.2, (truth + 1) % 3, truth)
    assert_found(
        crowd.judge_labels({}, labels, 3, crowd.Learners(rows, labels, 3)), labels != truth
    )


def test_rules_of_a_large_corpus_are_looked_for_in_a_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, truth, _ = corpus(14, 3000)
    labels = turned(truth, truth, 0, 2, 0.4)
    monkeypatch.setattr(crowd_of_labels, "_SAMPLE", 500)
    monkeypatch.setattr(pool, "_FIT_ROWS", 1000)
    heard: list[int] = []
    predict = crowd.Learners.predict

    def counted(
        self: crowd.Learners, transition: Floats, progress: crowd.Progress | None = None
    ) -> dict[str, Floats]:
        found = predict(self, transition, progress)
        heard.append(len(found["regression"]))
        return found

    monkeypatch.setattr(crowd.Learners, "predict", counted)
    questions = np.arange(3000)
    taught = crowd.Learners(rows, labels, 3, questions=questions)
    steps: list[tuple[str, int, int]] = []
    found = crowd.judge_labels({}, labels, 3, taught, progress=lambda *step: steps.append(step))
    assert_found(found, labels != truth)
    assert_counted(steps)
    assert {stage for stage, _, _ in steps} == {
        "learners", "sample", "confusions", "pairs of labels", "rules",
    }  # fmt: skip
    assert {size for size in heard if size > 500} == {3000}
    assert sum(size == 3000 for size in heard) <= 8


def test_a_sample_that_settles_late_is_progress_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _, labels = corpus(14, 1500)
    monkeypatch.setattr(crowd_of_labels, "_SAMPLE", 500)
    monkeypatch.setattr(crowd_of_labels, "_SETTLED", -1.0)
    steps: list[tuple[str, int, int]] = []
    taught = crowd.Learners(rows, labels, 3)
    crowd.judge_labels({}, labels, 3, taught, progress=lambda *step: steps.append(step))
    assert_counted(steps)
    assert [step for step in steps if step[0] == "learners"][-1][1:] == (7, 7)


def test_a_rule_where_some_records_lack_the_label_it_gives() -> None:
    """Half of the records have two options; of the others, 40 % of A are given as D."""
    rng = np.random.default_rng(3)
    widths = np.where(rng.random(3000) < 0.5, 2, 4)
    truth = (rng.random(3000) * widths).astype(np.int64)
    said = np.where(rng.random(3000) < 0.05, (truth + rng.integers(1, widths)) % widths, truth)
    likely = np.where(np.arange(4) < widths[:, None], np.eye(4)[said] * 0.8 + 0.05, 0.0)
    wide = widths == 4
    labels = truth.copy()
    labels[wide] = turned(truth[wide], truth[wide], 0, 3, 0.4)
    found = crowd.judge_labels({"model": likely}, labels, 4, options=widths)
    flagged = found.wrong > 0.5
    assert flagged[labels != truth].mean() > 0.9
    assert flagged[~wide].mean() < 0.07  # where the expert errs, and no more


def test_ideas_of_rules_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, truth, _ = corpus(14, 600)
    labels = turned(truth, truth, 0, 2, 0.4)
    tries: list[list[list[tuple[int, int]]]] = []
    suspected = crowd_of_labels._Crowd._suspected

    def kept(
        self: crowd_of_labels._Crowd, found: crowd_of_labels._Hearing
    ) -> list[list[tuple[int, int]]]:
        tries.append(suspected(self, found))
        return tries[-1]

    monkeypatch.setattr(crowd_of_labels._Crowd, "_suspected", kept)
    crowd.judge_labels({}, labels, 3, crowd.Learners(rows, labels, 3))
    assert [(0, 2)] in tries[0]
    for ideas in tries:
        assert len({frozenset(idea) for idea in ideas}) == len(ideas)


def test_rates_stay_below_one_where_no_label_is_as_bad_as_the_average() -> None:
    """After a rule is supposed of a frequent label, and hardly borne out."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    said = {"model": np.log(opinions(labels, 0.95, 3, rng)).astype(np.float32)}
    spread = 0.8 * Noise.even(0.2, 3).spread
    fit = pool.Fit({"model": "panel"}, said, Given(labels, 3), spread, 0.95)
    assert np.isfinite(fit.log_evidence)
    assert 0.0 < fit.rate < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_labels_that_overlap_by_nature_follow_no_rule(seed: int) -> None:
    """One kind of question is answered now with this, now with that; no answer is wrong."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(5, size=900)
    truth = np.array([0, 0, 1, 2, 2])[kind]
    truth[(kind == 1) & (rng.random(900) < 0.4)] = 1
    centres = rng.normal(size=(5, 16))
    for spread in (0.6, 3.0):  # told apart well, and hardly: then scattered noise is seen
        rows = centres[kind] + spread * rng.normal(size=(900, 16))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        found = crowd.judge_labels({}, truth, 3, crowd.Learners(rows, truth, 3))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(crowd_of_labels, "_PAIRS", 0)
            without = crowd.judge_labels({}, truth, 3, crowd.Learners(rows, truth, 3))
        np.testing.assert_array_equal(found.wrong, without.wrong)
        assert spread > 1 or (found.wrong > 0.5).mean() < 0.02


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), st.floats(0, 1), st.integers(0, 99))
def test_noise_is_a_transition_and_comes_back_from_it(classes: int, rate: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = Noise(rate, rng.random((classes, classes)) * (1 - np.eye(classes))).transition
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1.0)
    assert (1.0 - np.diag(found)).max() < 0.951
    shares = rng.dirichlet(np.ones(classes))
    again = Noise.of(found, shares)
    np.testing.assert_allclose(again.transition, found, atol=1e-9)
    assert again.rate == pytest.approx(float(shares @ (1.0 - np.diag(found))), abs=1e-9)
    even = Noise.even(0.3, classes).transition
    np.testing.assert_allclose(even[~np.eye(classes, dtype=bool)], 0.3 / (classes - 1))
