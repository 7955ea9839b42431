from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustft import crowd
from robustft.crowd import labels as crowd_of_labels
from robustft.crowd import learners, open_answers, pool
from robustft.crowd.judgement import Floats
from robustft.crowd.pool import Given, Noise, skill, transition
from robustft.detection.detectors import NO_BETTER_THAN_CHANCE


def auroc(wrong: np.ndarray, score: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(wrong, score))


def corpus(
    seed: int, count: int = 400, rate: float = 0.3, classes: int = 3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clustered unit rows, true labels, and given labels wrong at `rate`."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=count)
    centres = rng.normal(size=(classes, 16))
    rows = centres[truth] + 0.6 * rng.normal(size=(count, 16))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), truth, flipped(truth, rate, classes, rng)


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


# --- labels --------------------------------------------------------------------------------


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


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0, 5.0])
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_an_expert_may_be_too_sure_of_everything(factor: float, rate: float) -> None:
    said, truth, labels = sharpened(1500, rate, factor)
    found, wrong = crowd.judge_labels({"expert": said}, labels, 4), labels != truth
    assert found.noise_rate is not None
    assert abs(found.noise_rate.value - rate) < 0.05
    flagged = found.wrong > 0.5
    assert abs(found.expected_precision() - wrong[flagged].mean()) < 0.08
    best = crowd.judge_labels({"expert": sharpened(1500, rate, 1.0)[0]}, labels, 4).wrong > 0.5
    assert (flagged != best).mean() < 0.02


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

        def predict(self, transition: Floats) -> dict[str, Floats]:
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


# --- wrong labels that follow a rule --------------------------------------------------------


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

    def counted(self: crowd.Learners, transition: Floats) -> dict[str, Floats]:
        found = predict(self, transition)
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


def assert_counted(steps: list[tuple[str, int, int]]) -> None:
    """Every stage of the progress counts from 1 to its total at most."""
    for _, stage in itertools.groupby(steps, key=lambda step: step[0]):
        done, totals = zip(*((step[1], step[2]) for step in stage), strict=True)
        assert done == tuple(range(1, len(done) + 1))
        assert len(set(totals)) == 1
        assert done[-1] <= totals[0]


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


# --- learners -------------------------------------------------------------------------------


def test_no_record_judges_itself() -> None:
    rows, _, labels = corpus(3, 200)
    changed = labels.copy()
    changed[0] = (labels[0] + 1) % 3
    clean = np.eye(3)
    for expert in (
        lambda given: learners.neighbour_vote(rows, given, 3),
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
    for name, size in {
        "_WORD_ROWS": 100,
        "VOTERS": 1000,
        "_FIT_ROWS": 1000,
        "_CHUNK": 512,
    }.items():
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
    assert_counted(steps)


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
        lambda given: learners.neighbour_vote(rows, given, 3, questions=questions),
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


# --- open answers ---------------------------------------------------------------------------


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
