"""Wrong labels are found, and their rate, without the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_labels import auroc, corpus, flipped, opinions

from robustft import crowd
from robustft.crowd import labels as crowd_of_labels
from robustft.crowd import learners
from robustft.crowd.judgement import Floats
from robustft.crowd.pool import Given, skill, transition
from robustft.detection.warnings import NO_BETTER_THAN_CHANCE


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_learners_find_wrong_labels_and_their_rate_without_truth(rate: float) -> None:
    rows, truth, labels = corpus(1, 600, rate)
    found = crowd.judge_labels({}, labels, 3, crowd.Learners(rows, labels, 3))
    wrong = labels != truth
    assert auroc(wrong, found.wrong) > 0.93
    assert found.labels is not None
    assert (found.labels.argmax(1) == truth).mean() > 0.9
    assert found.noise_rate is not None
    assert found.noise_rate.low <= wrong.mean() <= found.noise_rate.high
    assert abs(found.noise_rate.value - wrong.mean()) < 0.05
    assert abs(found.expected_precision() - wrong[found.wrong > 0.5].mean()) < 0.1


def sharpened(rows: int, rate: float, factor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of an expert who is `factor` times too sure, true and given labels."""
    rng = np.random.default_rng(4)
    truth = rng.integers(4, size=rows)
    strength = rng.gamma(2.0, 1.5, rows)[:, None]
    scores = strength * (rng.normal(size=(rows, 4)) + strength * np.eye(4)[truth])
    return learners.softmax(factor * scores), truth, flipped(truth, rate, 4, rng)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_an_expert_may_be_too_sure_of_everything(rate: float) -> None:
    flags = []
    for factor in (1.0, 0.5, 3.0, 5.0):
        said, truth, labels = sharpened(1500, rate, factor)
        found, wrong = crowd.judge_labels({"expert": said}, labels, 4), labels != truth
        assert found.noise_rate is not None
        assert abs(found.noise_rate.value - rate) < 0.05
        flags.append(found.wrong > 0.5)
        assert abs(found.expected_precision() - wrong[flags[-1]].mean()) < 0.08
        assert (flags[-1] != flags[0]).mean() < 0.02


def test_a_weak_expert_does_not_overrule_right_answers() -> None:
    """Right in 40 % of four options and sure of it; 2 % of the given answers are wrong."""
    rng = np.random.default_rng(7)
    truth = rng.integers(4, size=2000)
    labels = flipped(truth, 0.02, 4, rng)
    found = crowd.judge_labels({"weak": opinions(truth, 0.4, 4, rng)}, labels, 4)
    assert (found.wrong > 0.5).mean() < 0.02


def test_an_expert_slightly_worse_than_chance_is_muted() -> None:
    """By accident one in a hundred is; far below chance it tells that most answers are wrong."""
    rng = np.random.default_rng(8)
    truth = rng.integers(3, size=900)
    said = opinions(truth, 0.30, 3, rng)
    assert -5 < skill(np.log(said), Given(truth, 3)) < -2.0
    assert crowd.judge_labels({"unlucky": said}, truth, 3).powerless


def test_one_record_with_more_options_changes_nothing_for_the_others() -> None:
    said, _, labels = sharpened(1000, 0.3, 1.0)
    alone = crowd.judge_labels({"expert": said}, labels, 4)
    wider = np.concatenate([np.pad(said, ((0, 0), (0, 2))), np.full((1, 6), 1 / 6)])
    widths = np.array([4] * 1000 + [6])
    more = np.append(labels, 5)
    found = crowd.judge_labels({"expert": wider}, more, 6, options=widths)
    assert alone.noise_rate is not None
    assert found.noise_rate is not None
    assert abs(found.noise_rate.value - alone.noise_rate.value) < 0.02
    np.testing.assert_allclose(found.wrong[:1000], alone.wrong, atol=0.03)
    assert found.labels is not None
    assert (found.labels[:1000, 4:] == 0).all()
    assert found.labels[1000, 4:].min() > 0


def test_an_expert_at_chance_is_muted() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=500)
    labels = flipped(truth, 0.2, 3, rng)
    noise = rng.dirichlet(np.ones(3), size=500)
    alone = crowd.judge_labels({"noise": noise}, labels, 3)
    assert alone.powerless
    assert alone.noise_rate is None
    assert (alone.wrong == 0.5).all()
    good = opinions(truth, 0.9, 3, rng)
    both = crowd.judge_labels({"noise": noise, "good": good}, labels, 3)
    assert both.weights == {"noise": 0.0, "good": 1.0}


def test_a_fine_tuned_expert_is_heard_for_what_it_knows() -> None:
    rng = np.random.default_rng(0)
    rows, truth, labels = corpus(1, 600, 0.4)
    rows = rows + 0.4 * rng.normal(size=rows.shape).astype(np.float32)  # hard for the learners
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    taught, wrong = crowd.Learners(rows, labels, 3), labels != truth
    alone = crowd.judge_labels({}, labels, 3, taught)
    good = {"tuned": opinions(truth, 0.9, 3, rng)}
    joined = crowd.judge_labels({}, labels, 3, taught, good)
    assert joined.weights["tuned"] > 0.1
    assert auroc(wrong, joined.wrong) > auroc(wrong, alone.wrong) + 0.02
    guessing = {"tuned": rng.dirichlet(np.ones(3), size=600)}
    muted = crowd.judge_labels({}, labels, 3, taught, guessing)
    assert muted.weights["tuned"] == 0.0
    np.testing.assert_array_equal(muted.wrong, alone.wrong)


@pytest.mark.parametrize(("accuracy", "count"), [(0.9, 24), (0.5, 150)])
def test_so_many_records_are_needed_to_stand_out(accuracy: float, count: int) -> None:
    """What the warning of a run in which nobody does tells its user."""
    told = f"right in {accuracy:.0%}".replace("%", " %")
    assert told in NO_BETTER_THAN_CHANCE
    assert f"from {count} " in NO_BETTER_THAN_CHANCE
    rng = np.random.default_rng(0)
    heard = {count: 0, count // 3: 0}
    for records in heard:
        for _ in range(100):
            truth = rng.integers(4, size=records)
            said = np.log(opinions(truth, accuracy, 4, rng))
            labels = flipped(truth, 0.3, 4, rng)
            heard[records] += skill(said, Given(labels, 4)) > crowd_of_labels._SIGNIFICANT
    assert heard[count] >= 85
    assert heard[count // 3] <= 60


def test_a_liking_for_one_option_is_no_skill() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(3, p=[0.7, 0.2, 0.1], size=1000)
    biased = np.tile([0.9, 0.05, 0.05], (1000, 1))
    assert crowd.judge_labels({"biased": biased}, labels, 3).powerless


def test_beyond_the_plurality_the_panel_is_the_anchor() -> None:
    rng = np.random.default_rng(0)
    rows, truth, _ = corpus(2, 1500, 0.0)
    labels = flipped(truth, 0.8, 3, rng)
    taught = crowd.Learners(rows, labels, 3)
    panel = {"base": opinions(truth, 0.85, 3, rng)}
    found = crowd.judge_labels(panel, labels, 3, taught)
    assert auroc(labels != truth, found.wrong) > 0.87
    assert found.noise_rate is not None
    assert abs(found.noise_rate.value - 0.8) < 0.07


@pytest.mark.parametrize("seed", range(4))
def test_random_labels_teach_nothing(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    rows, _, _ = corpus(seed, 300)
    labels = rng.integers(3, size=300)
    assert crowd.judge_labels({}, labels, 3, crowd.Learners(rows, labels, 3)).powerless


def test_learners_that_fall_silent_have_spoken() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=300)
    labels = np.where(rng.random(300) < 0.3, (truth + 1) % 3, truth)
    votes = np.eye(3)[truth] * 0.6 + 0.4 / 3
    replies = [{"neighbours": votes}] * 2

    class Neighbours(crowd.Learners):
        names = ("neighbours",)

        def __init__(self) -> None:
            """Learn nothing."""

        def predict(
            self, transition: Floats, progress: crowd.Progress | None = None
        ) -> dict[str, Floats]:
            return replies.pop() if replies else {}

        def sample(
            self, rows: learners.Labels, labels: tuple[int, int] | None = None
        ) -> crowd.Learners:
            return self

    judged = crowd.judge_labels({}, labels, 3, Neighbours())
    assert judged.weights == {"neighbours": 1.0}
    assert np.mean((judged.wrong > 0.5) == (labels != truth)) > 0.95


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 9))
def test_probabilities_are_probabilities(count: int, classes: int, seed: int) -> None:
    rows, truth, labels = corpus(seed, count, 0.4, classes)
    panel = {"base": opinions(truth, 0.9, classes, np.random.default_rng(seed))}
    taught = crowd.Learners(rows, labels, classes)
    found = crowd.judge_labels(panel, labels, classes, taught)
    assert ((found.wrong >= 0) & (found.wrong <= 1)).all()
    predicted = taught.predict(transition(0.2, np.full((classes, classes), 1 / classes)))
    for values in (*predicted.values(), *([] if found.labels is None else [found.labels])):
        assert values.shape == (count, classes)
        assert (values >= 0).all()
        np.testing.assert_allclose(values.sum(1), 1.0, atol=1e-6)


def test_one_label_only() -> None:
    rows, _, _ = corpus(0, 30)
    labels = np.zeros(30, dtype=np.int64)
    assert crowd.judge_labels({}, labels, 3, crowd.Learners(rows, labels, 3)).powerless


def test_no_records() -> None:
    rows, labels = np.zeros((0, 8), np.float32), np.zeros(0, np.int64)
    taught = crowd.Learners(rows, labels, 3)
    for panel, team in (({"model": np.zeros((0, 3))}, None), ({}, taught)):
        found = crowd.judge_labels(panel, labels, 3, team)
        assert found.powerless
        assert len(found.wrong) == 0


def test_skill_is_standard_normal_under_chance() -> None:
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(300):
        labels = rng.choice(4, p=[0.4, 0.3, 0.2, 0.1], size=200)
        expert = np.log(rng.dirichlet(np.full(4, 0.3), size=200) + 1e-4)
        scores.append(skill(expert, Given(labels, 4)))
    assert abs(np.mean(scores)) < 0.2
    assert abs(np.std(scores) - 1) < 0.15


def test_a_liking_for_one_option_neither_proves_nor_hides_what_an_expert_knows() -> None:
    """Rows that lean to option 0 by 5 nats and know a little: seen; the leaning alone: not."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 600)
    leaning = np.array([0.0, -5.0, -5.0])
    knowing = 0.3 * np.eye(3)[labels] + rng.normal(0.0, 1.0, (600, 3))
    given_labels = Given(labels, 3)
    alone = skill(rng.normal(0.0, 1.0, (600, 3)) + leaning, given_labels)
    both = skill(knowing + leaning, given_labels)
    assert abs(alone) < 2.6 < both
    assert both == pytest.approx(skill(knowing, given_labels))
