"""The crowd over open answers: K witnesses of one question, one of them the given answer.

Answers have no options, only sameness: `partition` says which witnesses of a question agree. Model
of one question, with x ~ N(0, 1) its difficulty and c the witnesses that are right (or none):

    p(witness k is right | x) = sigmoid(a_k - s x)      Rasch 1960; GLAD, Whitehill et al. 2009
    right answers are the same; wrong ones coincide as guests of a Chinese restaurant (Ewens 1972)
    with concentration t, log t ~ N(log t0, f): some questions have a favourite wrong answer

Abilities a, spread s, concentration t0 and f are those that make the partitions seen most likely,
under weak priors; the corpus' noise rate is how often witness 0, the given answer, is wrong. No
truth is used: three witnesses that agree more often than wrong answers coincide reveal how good
each is (Dawid and Skene 1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import digamma, expit, gammaln, logsumexp

from robustft import answers
from robustft.answers import Kind
from robustft.crowd.judgement import Floats, Judgement, rate_estimate

_ABILITY = (0.0, 1.5)  # a_k ~ N(0, 1.5), in logits
# Beside one or two other witnesses nothing but the prior tells whose fault a difference is: given
# answers are then expected to be right 8 times in 10. Beside one, how often wrong answers coincide
# is open as well.
_FEW = 3
_GIVEN_BESIDE_FEW = (1.4, 1.0)
_COINCIDENCE_BESIDE_ONE = (1.5, 2.0)
_LOG_SPREAD = (float(np.log(1.5)), 0.5)  # log s ~ N(log 1.5, 0.5)
_LOG_CONCENTRATION = (1.5, 0.2)  # log t, typical question: two wrong answers coincide at 18 %
_LOG_FAVOURITES = (float(np.log(1.4)), 1.0)  # log of log t's deviation between questions
# Where a witness contradicts the given answer, another that is right 99 times in 100 says the same
# 96 times in 100 (of 30 % wrong given answers), and a copy always.
_COPY, _CONTRADICTIONS = 0.97, 20
_ABLE = 3.0  # how much better or worse than expected, in logits, a search begins
# Searches that end nearer than this, in nats of height and in logits, have reached one peak.
_SAME_HEIGHT, _SAME_PLACE = 0.05, 1.0
_EXTREME = 20.0  # a logarithm beyond which nothing changes but that digits are lost
_LEAST_RATE = 1e-12  # rounding takes the rate of a corpus where all agree below 0
_FIT_PATTERNS = 5_000  # the model is fitted on at most this many different partitions

# [N, K] cluster of every witness, numbered by first appearance; -1: it gave no answer
Partitions = NDArray[np.int64]


def _normal_grid(points: int) -> tuple[Floats, Floats]:
    """Gauss-Hermite nodes of N(0, 1) and the logarithms of their weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return nodes, np.log(weights / weights.sum())


_DIFFICULTY, _DIFFICULTY_LOG = _normal_grid(15)
_FAVOURITE, _FAVOURITE_LOG = _normal_grid(7)


def partition(said: Sequence[str | None], kind: Kind) -> list[int]:
    """Which of a question's answers are the same: connected components of `answers.matches`.

    Clusters are numbered by first appearance; no answer (None) is -1.
    """
    cluster = list(range(len(said)))
    for b, second in enumerate(said):
        for a, first in enumerate(said[:b]):
            if cluster[a] != cluster[b] and answers.matches(first, second, kind=kind):
                old, new = max(cluster[a], cluster[b]), min(cluster[a], cluster[b])
                cluster = [new if number == old else number for number in cluster]
    order: dict[int, int] = {}
    return [
        -1 if answer is None else order.setdefault(number, len(order))
        for answer, number in zip(said, cluster, strict=True)
    ]


def renumbered(partitions: Partitions) -> Partitions:
    """Rows [n, K] whose clusters are numbered by first appearance again."""
    first = (partitions[:, :, None] == partitions[:, None, :]).argmax(2)
    is_new = (first == np.arange(partitions.shape[1])) & (partitions >= 0)
    return np.where(partitions < 0, -1, np.take_along_axis(is_new.cumsum(1) - 1, first, 1))


def copies(partitions: Partitions) -> dict[int, int]:
    """Witnesses that are one and the same as one before them: column -> that column.

    partitions: [N, K] rows of `partition`; column 0, the given answer, is nobody's copy. A copy
    errs as its original does, and its agreement would be taken for proof.
    """
    found: dict[int, int] = {}
    for column in range(2, partitions.shape[1]):
        for before in range(1, column):
            spoke = (partitions[:, [before, column]] >= 0).all(1)
            against = spoke & (partitions[:, before] != partitions[:, 0])
            same = partitions[against, column] == partitions[against, before]
            if before not in found and len(same) >= _CONTRADICTIONS and same.mean() > _COPY:
                found[column] = before
                break
    return found


class _Patterns:
    """Distinct partitions, and under every hypothesis who is right what is wrong about the rest."""

    def __init__(self, partitions: Partitions, counts: Floats) -> None:
        self.counts = counts  # [P]
        count, witnesses = partitions.shape
        clusters = np.arange(witnesses)[None, :, None]
        right = (partitions[:, None, :] == clusters).astype(np.float64)  # cluster c is right
        self.right = np.concatenate([right, np.zeros((count, 1, witnesses))], axis=1)  # or none
        size = self.right.sum(2)  # [P, K + 1]
        self.possible = size > 0
        self.possible[:, -1] = True
        orders = np.where(size > 0, gammaln(np.maximum(size, 1.0)), 0.0)
        self.orders = orders.sum(1, keepdims=True) - orders  # sum of log (n_c - 1)! of the wrong
        self.wrong_clusters = self.possible[:, :-1].sum(1, keepdims=True) - (size > 0)
        self.spoke = (partitions >= 0).astype(np.float64)  # [P, K]
        self.wrong = self.spoke.sum(1, keepdims=True) - size

    def coincidence(self, log_concentration: float, favourites: float) -> tuple[Floats, Floats]:
        """[P, K + 1] log-probability that the wrong answers coincide as they do.

        With it [2, P, K + 1] its slopes by log t0 and by log f.
        """
        deviation = favourites * _FAVOURITE
        logs = np.clip(log_concentration + deviation, -_EXTREME, _EXTREME)
        concentration = np.exp(logs)
        wrong, clusters = self.wrong[..., None], self.wrong_clusters[..., None]
        terms = _FAVOURITE_LOG + clusters * logs + gammaln(concentration)
        terms = terms - gammaln(concentration + wrong)
        total = logsumexp(terms, axis=2)
        slopes = clusters - concentration * (
            digamma(concentration + wrong) - digamma(concentration)
        )
        slopes *= np.exp(terms - total[..., None])
        by = np.stack([slopes.sum(2), slopes @ deviation])
        return np.where(self.possible, total + self.orders, -np.inf), by


def judge_partitions(partitions: Partitions, names: Sequence[str]) -> Judgement:
    """Judge witness 0, the given answer, of every question.

    Parameters
    ----------
    partitions: [N, K] rows of `partition`; column 0 is the given answer. A witness that gave no
        answer (-1) says nothing there: not answering is not a wrong answer of its own.
    names: of the other K - 1 witnesses.

    A weight is the witness' share of the probability of being right. All are 0 where the given
    answers agree with the others no more than wrong answers do by accident.
    """
    if len(partitions) == 0:
        return Judgement(np.zeros(0), None, dict.fromkeys(names, 0.0))
    patterns, inverse, counts = np.unique(
        partitions, axis=0, return_inverse=True, return_counts=True
    )
    inverse = inverse.reshape(-1)
    agreeing = (partitions[:, 1:] == partitions[:, :1]).mean(0)
    nothing = Judgement(np.full(len(partitions), 0.5), None, dict.fromkeys(names, 0.0))
    if len(names) == 0 or not _speaks(agreeing, len(partitions)):
        return nothing
    kept = np.argsort(-counts, kind="stable")[:_FIT_PATTERNS]
    fitted = _Patterns(patterns[kept], counts[kept].astype(np.float64))
    peaks = _peaks(fitted)
    whole = fitted if len(kept) == len(patterns) else _Patterns(patterns, counts.astype(np.float64))
    if whole is fitted:
        place = np.empty(len(kept), np.int64)
        place[kept] = np.arange(len(kept))
        inverse = place[inverse]
    given_right, right, rates, likely = np.zeros(len(patterns)), np.zeros(len(names)), [], []
    for peak in peaks:
        _, _, given, mean = _evaluate(peak.flat, whole)
        given_right += peak.share * given
        right += peak.share * mean[1:]
        rate = 1.0 - float(given @ whole.counts) / len(partitions)
        rate = min(max(rate, _LEAST_RATE), 1.0 - _LEAST_RATE)
        # It follows the given answers' ability a_0; its error is that of a_0 on the logit scale.
        off = peak.error * np.array([-1.0, 0.0, 1.0]) * 3**0.5
        rates.append(expit(np.log(rate / (1.0 - rate)) + off))
        likely.append(peak.share * np.array([1, 4, 1]) / 6)
    if not _confirms(given_right[inverse], partitions):
        return nothing
    estimate = rate_estimate(np.concatenate(rates), np.concatenate(likely), len(partitions))
    shares = right / max(float(right.sum()), 1e-12)
    weights = dict(zip(names, shares.tolist(), strict=True))
    return Judgement(np.clip(1.0 - given_right[inverse], 0.0, 1.0), estimate, weights)


def _speaks(agreeing: Floats, count: int) -> bool:
    """Whether any witness agrees with the given answers often enough to mean anything."""
    return bool((agreeing * count >= 3).any() and agreeing.max() > 0.01)


def _confirms(given_right: Floats, partitions: Partitions) -> bool:
    """Whether given answers that a witness shares come out more probable than the others.

    Where few are shared they may all be errors that coincide, and sharing one says nothing.
    """
    shared = (partitions[:, 1:] == partitions[:, :1]).any(1)
    return bool(shared.all() or given_right[shared].mean() > given_right[~shared].mean())


class _Peak(NamedTuple):
    """A peak of the posterior."""

    flat: Floats  # abilities, log s, log t0, log f
    error: float  # standard error of ability 0
    share: float  # of the posterior of all peaks, by their heights


def _peaks(patterns: _Patterns) -> list[_Peak]:
    """Where the posterior is highest: three witnesses seldom tell for certain who is the good one.

    Every search begins with other witnesses able: with all, none, or one.
    """
    witnesses = patterns.right.shape[2]
    prior = [_ABILITY] * witnesses + [_LOG_SPREAD, _LOG_CONCENTRATION, _LOG_FAVOURITES]
    if witnesses <= _FEW:
        prior[0] = _GIVEN_BESIDE_FEW
    if witnesses == 2:
        prior[-2] = _COINCIDENCE_BESIDE_ONE
    centre, width = np.array(prior).T

    def loss(flat: Floats) -> tuple[float, Floats]:
        evidence, gradient, _, _ = _evaluate(flat, patterns)
        strayed = (flat - centre) / width
        return 0.5 * float(strayed @ strayed) - evidence, strayed / width - gradient

    able = np.vstack([np.zeros(witnesses), np.ones(witnesses), 2 * np.eye(witnesses) - 1])
    starts = centre + _ABLE * np.pad(able, ((0, 0), (0, 3)))
    found = [minimize(loss, start, jac=True, method="L-BFGS-B") for start in starts]
    found.sort(key=lambda one: float(one.fun))
    tops: list[Any] = []
    for one in found:
        if not any(
            one.fun <= top.fun + _SAME_HEIGHT and np.abs(one.x - top.x).max() < _SAME_PLACE
            for top in tops
        ):
            tops.append(one)
    shares = np.exp(tops[0].fun - np.array([one.fun for one in tops]))
    shares /= shares.sum()
    return [
        _Peak(np.asarray(one.x), _error_of_first(one.x, loss), float(share))
        for one, share in zip(tops, shares, strict=True)
    ]


def _error_of_first(flat: Floats, loss: Callable[[Floats], tuple[float, Floats]]) -> float:
    """Standard error of the first parameter, by the curvature of the posterior at its peak."""
    step = 1e-3
    curvature = np.empty((len(flat), len(flat)))
    for row in range(len(flat)):
        ahead, behind = flat.copy(), flat.copy()
        ahead[row] += step
        behind[row] -= step
        curvature[row] = (loss(ahead)[1] - loss(behind)[1]) / (2 * step)
    variance = float(np.linalg.pinv((curvature + curvature.T) / 2)[0, 0])
    return math.sqrt(max(variance, 0.0))


def _evaluate(flat: Floats, patterns: _Patterns) -> tuple[float, Floats, Floats, Floats]:
    """(log-evidence, its gradient, [P] probability that the given answer is right, [K] mean)."""
    abilities, (spread, favourites) = flat[:-3], np.exp(np.minimum(flat[[-3, -1]], _EXTREME))
    scores = abilities - spread * _DIFFICULTY[:, None]  # [Q, K]
    # [P, Q] all who spoke are wrong, and x
    nobody = _DIFFICULTY_LOG - patterns.spoke @ np.logaddexp(0.0, scores).T
    coincidence, slopes = patterns.coincidence(float(flat[-2]), favourites)
    gains = np.einsum("pck,qk->pcq", patterns.right, scores)
    joint = nobody[:, None] + gains + coincidence[..., None]  # [P, K + 1, Q]
    total = logsumexp(joint, axis=(1, 2))
    posterior = np.exp(joint - total[:, None, None])
    counts = patterns.counts
    who = posterior.sum(2)  # [P, K + 1] which cluster is right
    at = np.einsum("p,pcq,pk->qk", counts, posterior, patterns.spoke)
    surplus = np.einsum("p,pcq,pck->qk", counts, posterior, patterns.right)
    surplus = surplus - at * expit(scores)  # [Q, K] right beyond expectation
    by_spread = -float(spread * (surplus.sum(1) @ _DIFFICULTY))
    gradient = np.concatenate([surplus.sum(0), [by_spread], (who * slopes).sum(2) @ counts])
    right = np.einsum("pc,pck->pk", who, patterns.right)
    mean = counts @ right / counts.sum()
    return float(counts @ total), gradient, right[:, 0], mean
