"""The crowd over a set of options: which of C labels is right, and was it the one given?

Model of one record (x: what the experts see, z: the true label, y: the given one):

    p(z | x)  =  softmax_z( b[z] + sum_m w_m log p_m(z | x) / p_m(z) )   pooled experts, w_m >= 0
    p(y | z)  =  1 - e  where y = z,  e R[z, y]  elsewhere               how labels go wrong
    p(z | x, y)  ~  p(z | x) p(y | z)                                    the judgement

p_m(z) is an expert's mean over the records: what it says of every record alike counts once, in b,
and not as often as there are experts. Otherwise rare labels would be judged wrong for being rare.
Weights, bias and noise rate e are those that make the given labels likely: maximise
sum_i log sum_z p(z | x_i) p(y_i | z). No truth is needed because every expert is ignorant of the
y it judges. That is the confusion model of Dawid and Skene (1979) with the given label as a
witness of unknown reliability; a logarithmic opinion pool (Genest and Zidek 1986) joins the others,
and the likelihood is that of a noise adaptation layer (Sukhbaatar et al. 2014, arXiv 1406.2080).
The noise rate is not fixed at one value: hypotheses e on a grid are weighted by their evidence.
A record may have fewer options than others; those it lacks are neither true nor given there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from robustft.crowd.judgement import Floats, Judgement, rate_estimate
from robustft.crowd.learners import Labels, Learners, Progress, label_frequencies, softmax

# Standard deviations above chance: 0.5 % of the experts at chance pass, and learners on 3 % of the
# corpora that teach nothing (their tries are several, and each label is in others' predictions).
_SIGNIFICANT = 2.6
_CONTRARY = 5.0  # so far below chance, an expert tells that most given answers are wrong
# Least probability an expert is taken to mean. A language model is surer than it should be: how
# much surer of one answer than of another must not be cut off with it.
_FLOOR = 1e-30
_RAREST = 1e-4  # least mean probability of an option
_FIRST_RATE = 0.2  # where nothing better is known when the learners first learn
_ROUNDS = 6  # learners and noise model, in turn, at most
_SETTLED = 0.01  # until the noise rate moves no more than this
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
_PSEUDO_COUNTS = 50.0  # wrong labels of every true label, spread evenly, added to those found


class _Given:
    """The given labels, each out of the first `widths[i]` of C options."""

    def __init__(self, labels: Labels, classes: int, widths: Labels | None = None) -> None:
        self.labels, self.classes = labels, classes
        self._widths = np.full(len(labels), classes) if widths is None else widths
        self._known, self._kind = np.unique(self._widths, return_inverse=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Labels) -> _Given:
        return _Given(self.labels[rows], self.classes, self._widths[rows])

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
        """[N, C] p(y_i | z)."""
        tables = np.stack([transition(rate, one) for one in self._among_options(spread)])
        return np.asarray(tables[self._kind, :, self.labels])

    def _among_options(self, shares: Floats) -> list[Floats]:
        """`shares` [..., C] of all options as shares of the first ones, by how many there are."""
        within = [np.where(np.arange(self.classes) < width, shares, 0.0) for width in self._known]
        return [one / np.maximum(one.sum(-1, keepdims=True), 1e-12) for one in within]


@dataclass(frozen=True, slots=True)
class _Pool:
    """One hypothesis about the noise rate, with the weights and bias that suit it best."""

    rate: float
    weights: Floats  # [M]
    bias: Floats  # [C]
    log_evidence: float


def judge_labels(
    panel: Mapping[str, Floats],
    given: Labels,
    classes: int,
    learners: Learners | None = None,
    tuned: Mapping[str, Floats] | None = None,
    *,
    options: Labels | None = None,
    progress: Progress | None = None,
) -> Judgement:
    """Judge every given label by experts that did not see it.

    Parameters
    ----------
    panel: expert -> [N, C] probabilities of the options, from models not trained on `given`.
    given: [N] labels in [0, C).
    learners: experts trained on the given labels, out of fold.
    tuned: expert -> [N, C] probabilities, from models fine-tuned on labels, out of fold.
    options: [N] how many of the C options a record has, its first ones; all C when None.
    progress: called as `progress("learners", done, total)`, over early where the rate settles.

    An expert that predicts the given labels no better than their frequencies do is muted. A panel
    expert may also predict them *worse* than chance: then most answers are wrong, and the panel
    is what tells; learners alone cannot see noise beyond the plurality and are muted there.
    """
    known = _Given(given, classes, options)
    lacking = known.lacking
    logs = {name: _logs(values) for name, values in panel.items()}
    skills = {name: skill(values, known) for name, values in logs.items()}
    anchors = {n: logs[n] for n, z in skills.items() if z > _SIGNIFICANT or z < -_CONTRARY}
    ceiling = 0.95 if anchors else (classes - 1) / classes
    spread = (np.ones((classes, classes)) - np.eye(classes)) / max(classes - 1, 1)
    trained = {name: _logs(values) for name, values in (tuned or {}).items()}
    heard = {name: v for name, v in trained.items() if skill(v, known) > _SIGNIFICANT}
    experts, pools, evidence = anchors | heard, list[_Pool](), np.zeros(0)
    rate = _FIRST_RATE
    passes = itertools.count(1)

    def teach(rate: float) -> dict[str, Floats]:
        found = learners.predict(transition(rate, spread)) if learners else {}
        if progress is not None:
            progress("learners", next(passes), _ROUNDS + 1)
        return {name: _logs(values) for name, values in found.items()}

    taught = teach(rate) if learners else {}
    able = _able(taught, teach, known) if learners else []
    for number in range(_ROUNDS if able else 1):
        if able and number:
            taught = teach(rate)
        if able and (number or not (anchors or heard)):
            found = anchors | heard | {name: taught[name] for name in able if name in taught}
            if not found:
                break  # the learners fell silent: what they said before counts
            experts = found
        if not experts:
            break
        kinds = {name: "panel" for name in anchors} | {name: "tuned" for name in heard}
        means = {name: _mean_probabilities(v, lacking) for name, v in experts.items()}
        opinions = np.stack([v - np.log(means[name], dtype=np.float32)
                             for name, v in experts.items()])  # fmt: skip
        # Who has learnt from the corpus knows how frequent each label is without the wrong ones.
        taught_means = [mean for name, mean in means.items() if name not in anchors]
        frequent = np.mean(taught_means or [np.maximum(known.frequencies, _RAREST)], axis=0)
        prior = _weight_prior([kinds.get(name, "learners") for name in experts])
        pools = _fit_pools(opinions, known, spread, prior, np.log(frequent), ceiling)
        evidence = softmax(np.array([pool.log_evidence for pool in pools]))
        before, rate = rate, float(evidence @ [pool.rate for pool in pools])
        spread = _wrong_labels(opinions, known, spread, pools, evidence)
        if number and abs(rate - before) < _SETTLED:
            break
    weights = dict.fromkeys([*panel, *trained, *(learners.names if learners else ())], 0.0)
    if not pools:
        return Judgement(np.full(len(given), 0.5), None, weights)
    mean = evidence @ np.stack([pool.weights for pool in pools])
    weights |= dict(zip(experts, (mean / max(mean.sum(), 1e-12)).tolist(), strict=True))
    labels, rates = _posterior(opinions, known, spread, pools, evidence)
    wrong = np.clip(1.0 - labels[np.arange(len(given)), given], 0.0, 1.0)
    voting = set(experts).intersection(learners.names if learners else ())
    learned = {name: softmax(values) for name, values in experts.items() if name in voting}
    return Judgement(wrong, rate_estimate(rates, evidence, len(given)), weights, labels, learned)


def _able(
    taught: Mapping[str, Floats], teach: Callable[[float], Mapping[str, Floats]], given: _Given
) -> list[str]:
    """Names of the learners to hear; none where not one of them beats chance.

    Tried as if little (`taught`) and as if much were wrong, for under the wrong noise rate a
    regression learns less. All learn from the same records: what one of them proves, that these can
    be learnt, no other has to prove again.
    """
    skills: dict[str, float] = {}
    for logs in (taught, teach(0.75 * (given.classes - 1) / given.classes)):
        for name, values in logs.items():
            found = skill(values, given)
            skills[name] = max(found, skills.get(name, found))
    proven = max(skills.values(), default=0.0) > _SIGNIFICANT
    return [name for name, found in skills.items() if proven and found > 0]


def skill(opinions: Floats, given: _Given) -> float:
    """How far an expert predicts the given labels beyond their frequencies, in standard deviations.

    The score test (Rao 1948) of w = 0 in p(y | x) ~ exp(b[y]) p_m(y | x)^w, b free: under chance it
    is standard normal, whatever the expert's calibration (a learner's deviation is up to the square
    root of 2: of two records each predicts the other). Its liking for one option, the same in
    every record, tells nothing and is taken out: it would drown what it knows.
    """
    had = ~given.lacking
    liking = (opinions * had).sum(0) / np.maximum(had.sum(0), 1)
    opinions = np.where(had, opinions - liking, 0.0)
    expected = given.expected
    means = (opinions * expected).sum(1)
    gained = opinions[np.arange(len(given)), given.labels] - means
    variance = float(((opinions - means[:, None]) ** 2 * expected).sum())
    return float(gained.sum()) / variance**0.5 if variance > 1e-12 else 0.0


def transition(rate: float, spread: Floats) -> Floats:
    """[C, C] T[z, y] = p(y | z): wrong at `rate`, then distributed as the rows of `spread`."""
    return (1.0 - rate) * np.eye(len(spread)) + rate * spread


def _logs(values: Floats) -> Floats:
    return np.log(np.clip(values, _FLOOR, 1.0)).astype(np.float32)


def _mean_probabilities(logs: Floats, lacking: NDArray[np.bool_]) -> Floats:
    """[C] mean probability of every option, over the records that have it."""
    had = ~lacking
    total = (np.exp(logs) * had).sum(0, dtype=np.float64)
    return np.asarray(np.maximum(total / np.maximum(had.sum(0), 1), _RAREST))


def _pooled(weights: Floats, bias: Floats, opinions: Floats, lacking: NDArray[np.bool_]) -> Floats:
    """[N, C] p(z | x) from log-probabilities [M, N, C]; none for options that a record lacks."""
    scores = np.tensordot(weights, opinions, 1) + bias
    scores[lacking] = -np.inf
    return softmax(scores)


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
    given: _Given,
    spread: Floats,
    prior: tuple[Floats, Floats],
    log_frequent: Floats,
    ceiling: float,
) -> list[_Pool]:
    """The best pool under every noise rate of the grid, neighbours starting from each other."""
    if len(given) > _FIT_ROWS:
        rows = np.sort(np.random.default_rng(0).choice(len(given), _FIT_ROWS, replace=False))
        opinions, given = opinions[:, rows], given[rows]
    opinions = opinions.astype(np.float64)
    lacking = given.lacking
    pools: list[_Pool] = []
    start = np.concatenate([prior[0], log_frequent])
    for rate in np.arange(0.01, ceiling - 0.005, _RATE_STEP):
        likelihood = given.likelihood(float(rate), spread)
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
) -> _Pool:
    expected, precision = prior
    count = len(opinions)

    def loss(flat: Floats) -> tuple[float, Floats]:
        predicted = _pooled(flat[:count], flat[count:], opinions, lacking)
        joint = predicted * likelihood
        evidence = joint.sum(1)
        off = predicted - joint / evidence[:, None]  # gradient with respect to the scores
        strayed, off_bias = flat[:count] - expected, flat[count:] - log_frequent
        pull, pull_bias = precision @ strayed, off_bias / _BIAS_SPREAD**2
        penalty = 0.5 * float(strayed @ pull + off_bias @ pull_bias)
        by_weight = np.einsum("nc,mnc->m", off, opinions) + pull
        by_bias = off.sum(0) + pull_bias
        return penalty - float(np.log(evidence).sum()), np.concatenate([by_weight, by_bias])

    bounds = [(0.0, None)] * count + [(None, None)] * len(log_frequent)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    log_prior = _RATE_PRIOR * float(np.log1p(-rate))
    return _Pool(rate, found.x[:count], found.x[count:], log_prior - float(found.fun))


def _posterior(
    opinions: Floats, given: _Given, spread: Floats, pools: list[_Pool], evidence: Floats
) -> tuple[Floats, Floats]:
    """([N, C] p(z | x, y), averaged over the hypotheses; [H] noise rate under each)."""
    labels = np.zeros(opinions.shape[1:])
    rates = np.array([pool.rate for pool in pools])
    likely = np.flatnonzero(evidence > 1e-4)
    kept = np.zeros(len(pools))
    for low in range(0, len(given), _CHUNK):
        rows = slice(low, low + _CHUNK)
        some = given[rows]
        lacking = some.lacking
        for index in likely:
            pool = pools[index]
            joint = _pooled(pool.weights, pool.bias, opinions[:, rows], lacking)
            joint *= some.likelihood(pool.rate, spread)
            joint /= joint.sum(1, keepdims=True)
            labels[rows] += evidence[index] * joint
            kept[index] += float(joint[np.arange(len(joint)), some.labels].sum())
    rates[likely] = 1.0 - kept[likely] / len(given)
    return labels / labels.sum(1, keepdims=True), rates


def _wrong_labels(
    opinions: Floats, given: _Given, spread: Floats, pools: list[_Pool], evidence: Floats
) -> Floats:
    """[C, C] R[z, y]: which wrong label a true one turns into, from the expected counts."""
    classes = len(spread)
    labels, _ = _posterior(opinions, given, spread, pools, evidence)
    counts = np.stack([labels[given.labels == y].sum(0) for y in range(classes)], axis=1)
    counts += _PSEUDO_COUNTS / max(classes - 1, 1)
    np.fill_diagonal(counts, 0.0)
    return np.asarray(counts / np.maximum(counts.sum(1, keepdims=True), 1e-12))
