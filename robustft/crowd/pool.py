"""Experts' opinions as one, and how given labels go wrong: both fitted to the given labels.

The model is in `labels.py`. A corpus' noise is its rate e and its spread S, C x C and 0 on the
diagonal: p(y | z) = e S[z, y] where y is not z. The rows of S sum to about 1 on average, so that e
is about the share of wrong labels; where a row sums to more, that label goes wrong more often.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

from robustft.crowd.judgement import Floats
from robustft.crowd.learners import log_loss, softmax
from robustft.crowd.neighbours import Labels, label_frequencies

# Least probability an expert is taken to mean. A language model is surer than it should be: how
# much surer of one answer than of another must not be cut off with it.
_FLOOR = 1e-30
_RAREST = 1e-4  # least mean probability of an option
_RATE_STEP = 0.02
_RATE_PRIOR = 2.0  # p(e) ~ (1 - e)^2: where nothing else tells, few answers are wrong
_FIT_ROWS = 20_000  # the pool is fitted on at most this many rows
_CHUNK = 65_536
# Summed weight expected a priori. Learners are fitted under a penalty, on labels that are wrong in
# part: their probabilities are too flat. A language model's are taken at their word.
_EXPECTED = {"learners": 4.5, "panel": 1.0, "tuned": 1.0}
_SUM_SPREAD = 0.7  # standard deviation of that sum, a priori
_SPREAD = 1.0  # standard deviation of a single weight around its share of the sum
_BIAS_SPREAD = 0.5  # standard deviation of b[z] around the log of how frequent z is
_PSEUDO_COUNTS = 50.0  # wrong labels of every true label, spread as expected, added to those found
_PSEUDO_RECORDS = 200.0  # of every true label, as often wrong as expected, likewise
_MOST_WRONG = 0.95  # of a label


class Given:
    """The given labels, each out of the first `widths[i]` of C options."""

    def __init__(self, labels: Labels, classes: int, widths: Labels | None = None) -> None:
        self.labels, self.classes = labels, classes
        self._widths = np.full(len(labels), classes) if widths is None else widths
        self._known, self._kind = np.unique(self._widths, return_inverse=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Labels) -> Given:
        return Given(self.labels[rows], self.classes, self._widths[rows])

    @property
    def lacking(self) -> NDArray[np.bool_]:
        """[N, C] options that a record does not have."""
        return np.arange(self.classes) >= self._widths[:, None]

    @functools.cached_property
    def frequencies(self) -> Floats:
        """[C] share of each label."""
        return label_frequencies(self.labels, self.classes)

    @property
    def expected(self) -> Floats:
        """[N, C] how frequent each of a record's options is among given labels."""
        return np.stack(self._among_options(self.frequencies))[self._kind]

    def likelihood(self, rate: float, spread: Floats) -> Floats:
        """[N, C] p(y_i | z).

        Labels go wrong as often where there are fewer options, unless those that are lacking are
        the very ones they turn into.
        """
        tables = []
        for width, shares in zip(self._known, self._among_options(spread), strict=True):
            if_even = spread[:, :width].sum(1) * ((self.classes - 1) / max(width - 1, 1))
            wrong = np.minimum(spread.sum(1), if_even)[:, None]
            tables.append(transition(rate, shares * wrong))
        return np.asarray(np.stack(tables)[self._kind, :, self.labels])

    def _among_options(self, shares: Floats) -> list[Floats]:
        """`shares` [..., C] of all options as shares of the first ones, by how many there are."""
        within = [np.where(np.arange(self.classes) < width, shares, 0.0) for width in self._known]
        return [one / np.maximum(one.sum(-1, keepdims=True), 1e-12) for one in within]


@dataclass(frozen=True, slots=True)
class Noise:
    """How labels go wrong."""

    rate: float  # share of wrong labels
    spread: Floats  # [C, C] what wrong ones turn into, its rows about 1 on average

    @classmethod
    def even(cls, rate: float, classes: int) -> Noise:
        """Every label alike, into every other alike."""
        return cls(rate, (np.ones((classes, classes)) - np.eye(classes)) / max(classes - 1, 1))

    @classmethod
    def possible(cls, rate: float, frequencies: Floats) -> Noise:
        """Every label alike, into every other alike but for those too rare for that.

        frequencies: [C] of the given labels. Of a label that is given to fewer records than would
        get it by mistake alone, no more than these can be mistakes.
        """
        classes = len(frequencies)
        most = np.minimum(frequencies * (max(classes - 1, 1) / rate), 1.0)
        into = most * (1.0 - np.eye(classes))
        total = into.sum(1, keepdims=True)
        return cls(rate, np.where(total > 0, into / np.maximum(total, 1e-12), 0.0))

    @classmethod
    def of(cls, transition: Floats, shares: Floats) -> Noise:
        """What is off the diagonal; shares: [C] of the true labels."""
        wrong = transition - np.diag(np.diag(transition))
        rate = max(float(shares @ wrong.sum(1)), 1e-12)
        return cls(rate, wrong / rate)

    @property
    def transition(self) -> Floats:
        """[C, C] T[z, y] = p(y | z)."""
        return transition(self.rate, self.spread)


def transition(rate: float, spread: Floats) -> Floats:
    """[C, C] T[z, y] = p(y | z): off the diagonal `rate` times `spread`, 0.95 of a row at most."""
    wrong = rate * spread
    total = wrong.sum(1, keepdims=True)
    wrong = wrong * np.minimum(1.0, _MOST_WRONG / np.maximum(total, 1e-12))
    return np.asarray(wrong + np.diag(1.0 - wrong.sum(1)))


@dataclass(frozen=True, slots=True)
class Pool:
    """One hypothesis about the noise rate, with the weights and bias that suit it best."""

    rate: float
    weights: Floats  # [M]
    bias: Floats  # [C]
    log_evidence: float


class Fit:
    """Experts pooled under every noise rate of a grid; each of these counts by its evidence.

    Parameters
    ----------
    kinds: expert -> `panel`, `tuned` or `learners`, of these and maybe others.
    experts: expert -> [N, C] log-probabilities.
    spread: [C, C] of the noise.
    ceiling: of the noise rate, of whichever label is the worst.
    """

    def __init__(
        self, kinds: Mapping[str, str], experts: Mapping[str, Floats], given: Given,
        spread: Floats, ceiling: float,
    ) -> None:  # fmt: skip
        lacking = given.lacking
        means = {name: _mean_probabilities(values, lacking) for name, values in experts.items()}
        # [M, C, N]: records come last, for numpy is slow over an axis of a few options.
        self._opinions = np.stack([(values - np.log(means[name], dtype=np.float32)).T
                                   for name, values in experts.items()])  # fmt: skip
        # Who has learnt from the corpus knows how frequent each label is without the wrong ones.
        taught = [mean for name, mean in means.items() if kinds[name] != "panel"]
        frequent = np.mean(taught or [np.maximum(given.frequencies, _RAREST)], axis=0)
        prior = _weight_prior([kinds[name] for name in experts])
        self._given, self._spread, self.experts = given, spread, experts
        self._pools = _fit_pools(self._opinions, given, spread, prior, np.log(frequent), ceiling)
        logs = np.array([pool.log_evidence for pool in self._pools])
        self.log_evidence = float(logsumexp(logs))
        self.evidence = softmax(logs)  # [H] share of each hypothesis
        self.rate = float(self.evidence @ [pool.rate for pool in self._pools])
        self.weights = self.evidence @ np.stack([pool.weights for pool in self._pools])  # [M]

    @functools.cached_property
    def predicted(self) -> Floats:
        """[N, C] p(z | x), by the likeliest hypothesis: what is said without the given label."""
        best = self._pools[int(self.evidence.argmax())]
        return _pooled(best, self._opinions, self._given)

    def posterior(self, spread: Floats) -> tuple[Floats, Floats]:
        """([N, C] p(z | x, y), averaged over the hypotheses; [H] noise rate under each)."""
        labels = np.zeros((len(self._given), self._given.classes))
        rates = np.array([pool.rate for pool in self._pools])
        likely = np.flatnonzero(self.evidence > 1e-4)
        kept = np.zeros(len(rates))
        for low in range(0, len(self._given), _CHUNK):
            rows = slice(low, low + _CHUNK)
            some = self._given[rows]
            for index in likely:
                pool = self._pools[index]
                joint = _pooled(pool, self._opinions[:, :, rows], some)
                joint *= some.likelihood(pool.rate, spread)
                joint /= joint.sum(1, keepdims=True)
                labels[rows] += self.evidence[index] * joint
                kept[index] += float(joint[np.arange(len(joint)), some.labels].sum())
        rates[likely] = 1.0 - kept[likely] / len(self._given)
        return labels / labels.sum(1, keepdims=True), rates

    def wrong_labels(self, expected: Floats) -> Floats:
        """[C, C] spread of the noise, from the expected counts and from what was expected before.

        How much more often than others a label goes wrong, and into which.
        """
        labels, _ = self.posterior(self._spread)
        given = self._given.labels
        counts = np.stack([labels[given == y].sum(0) for y in range(len(expected))], axis=1)
        total = counts.sum(1)
        np.fill_diagonal(counts, 0.0)
        wrong = counts.sum(1)
        common = max(float(wrong.sum() / max(total.sum(), 1e-12)), 1e-12)
        usual = expected.sum(1)
        relative = (wrong / common + _PSEUDO_RECORDS * usual) / (total + _PSEUDO_RECORDS)
        counts += _PSEUDO_COUNTS * expected / np.maximum(usual[:, None], 1e-12)
        return np.asarray(counts * (relative / np.maximum(counts.sum(1), 1e-12))[:, None])


def skill(opinions: Floats, given: Given) -> float:
    """How far an expert predicts the given labels beyond their frequencies, in standard deviations.

    The score test (Rao 1948) of w = 0 in p(y | x) ~ exp(b[y]) p_m(y | x)^w, b free: under chance it
    is standard normal, whatever the expert's calibration (a learner's deviation is up to the square
    root of 2: of two records each predicts the other). Its liking for one option, the same in
    every record, tells nothing and is taken out: it would drown what it knows.
    """
    if not len(given):
        return 0.0
    had = ~given.lacking
    liking = (opinions * had).sum(0) / np.maximum(had.sum(0), 1)
    opinions = np.where(had, opinions - liking, 0.0)
    expected = given.expected
    means = (opinions * expected).sum(1)
    gained = opinions[np.arange(len(given)), given.labels] - means
    variance = float(((opinions - means[:, None]) ** 2 * expected).sum())
    return float(gained.sum()) / variance**0.5 if variance > 1e-12 else 0.0


def logs_of(values: Floats) -> Floats:
    """Logarithms of probabilities, of the floor at least."""
    return np.log(np.clip(values, _FLOOR, 1.0)).astype(np.float32)


def _mean_probabilities(logs: Floats, lacking: NDArray[np.bool_]) -> Floats:
    """[C] mean probability of every option, over the records that have it."""
    had = ~lacking
    total = (np.exp(logs) * had).sum(0, dtype=np.float64)
    return np.asarray(np.maximum(total / np.maximum(had.sum(0), 1), _RAREST))


def _pooled(pool: Pool, opinions: Floats, given: Given) -> Floats:
    """[N, C] p(z | x) from log-probabilities [M, C, N]."""
    return softmax(_scores(pool.weights, pool.bias, opinions, given.lacking.T).T)


def _scores(weights: Floats, bias: Floats, opinions: Floats, lacking: NDArray[np.bool_]) -> Floats:
    """[C, N] of the options from log-probabilities [M, C, N]; -inf for those a record lacks."""
    scores = np.tensordot(weights, opinions, 1)
    scores += bias[:, None]
    scores[lacking] = -np.inf
    return scores


def _weight_prior(kinds: Sequence[str]) -> tuple[Floats, Floats]:
    """([M] means, [M, M] precision) of the weights: the sum of each kind of expert is expected."""
    mean = np.zeros(len(kinds))
    precision = np.eye(len(kinds)) / _SPREAD**2
    for kind, expected in _EXPECTED.items():
        member = np.array([one == kind for one in kinds])
        mean[member] = expected / max(int(member.sum()), 1)
        precision += np.outer(member, member) / _SUM_SPREAD**2
    return mean, precision


def _fit_pools(
    opinions: Floats,
    given: Given,
    spread: Floats,
    prior: tuple[Floats, Floats],
    log_frequent: Floats,
    ceiling: float,
) -> list[Pool]:
    """The best pool under every noise rate of the grid, neighbours starting from each other."""
    if len(given) > _FIT_ROWS:
        rows = np.sort(np.random.default_rng(0).choice(len(given), _FIT_ROWS, replace=False))
        opinions, given = opinions[:, :, rows], given[rows]
    opinions = np.ascontiguousarray(opinions, np.float64)
    lacking = given.lacking.T.copy()
    pools: list[Pool] = []
    start = np.concatenate([prior[0], log_frequent])
    worst = max(float(spread.sum(1).max()), 1.0)  # below 1, rates would reach 1 and more
    for rate in np.arange(0.01, ceiling - 0.005, _RATE_STEP) / worst:
        likelihood = given.likelihood(float(rate), spread).T.copy()
        pool = _fit_pool(float(rate), opinions, lacking, likelihood, prior, log_frequent, start)
        start = np.concatenate([pool.weights, pool.bias])
        pools.append(pool)
    return pools


def _fit_pool(
    rate: float,
    opinions: Floats,
    lacking: NDArray[np.bool_],
    likelihood: Floats,
    prior: tuple[Floats, Floats],
    log_frequent: Floats,
    start: Floats,
) -> Pool:
    """The best pool under one noise rate; opinions [M, C, N], lacking and likelihood [C, N]."""
    expected, precision = prior
    count = len(opinions)
    flat_opinions = opinions.reshape(count, -1)

    def loss(flat: Floats) -> tuple[float, Floats]:
        scores = _scores(flat[:count], flat[count:], opinions, lacking)
        surprise, off = log_loss(scores, likelihood)
        strayed, off_bias = flat[:count] - expected, flat[count:] - log_frequent
        pull, pull_bias = precision @ strayed, off_bias / _BIAS_SPREAD**2
        penalty = 0.5 * float(strayed @ pull + off_bias @ pull_bias)
        gradient = np.concatenate([flat_opinions @ off.ravel() + pull, off.sum(1) + pull_bias])
        return penalty + surprise, gradient

    bounds = [(0.0, None)] * count + [(None, None)] * len(log_frequent)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    log_prior = _RATE_PRIOR * float(np.log1p(-rate))
    return Pool(rate, found.x[:count], found.x[count:], log_prior - float(found.fun))
