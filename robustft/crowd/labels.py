"""The crowd over a set of options: which of C labels is right, and was it the one given?

Model of one record (x: what the experts see, z: the true label, y: the given one):

    p(z | x)  =  softmax_z( b[z] + sum_m w_m log p_m(z | x) / p_m(z) )   pooled experts, w_m >= 0
    p(y | z)  =  e S[z, y]  where y is not z,  else the rest             how labels go wrong
    p(z | x, y)  ~  p(z | x) p(y | z)                                    the judgement

p_m(z) is an expert's mean over the records: what it says of every record alike counts once, in b,
and not as often as there are experts. Otherwise rare labels would be judged wrong for being rare.
Weights, bias and noise rate e are those that make the given labels likely: maximise
sum_i log sum_z p(z | x_i) p(y_i | z). No truth is needed because every expert is ignorant of the
y it judges. That is the confusion model of Dawid and Skene (1979) with the given label as a
witness of unknown reliability; a logarithmic opinion pool (Genest and Zidek 1986) joins the others,
and the likelihood is that of a noise adaptation layer (Sukhbaatar et al. 2014, arXiv 1406.2080).
The noise rate is not fixed at one value: hypotheses e on a grid are weighted by their evidence.
The rows of S say how much more often than others a label goes wrong, and into which; they are
expected to be alike. Wrong labels that follow a rule, as where a third of z is called y, would
be learnt by the experts that learn from labels: such rules are supposed, alone and together, and
kept where the evidence rises.
A record may have fewer options than others; those it lacks are neither true nor given there.
"""

from __future__ import annotations

import copy
import functools
import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from robustft.crowd.judgement import Estimate, Floats, Judgement, rate_estimate
from robustft.crowd.learners import Learners, softmax
from robustft.crowd.neighbours import Labels, Progress
from robustft.crowd.pool import Fit, Given, Noise, logs_of, skill

# Standard deviations above chance: 0.5 % of the experts at chance pass, and learners on 3 % of the
# corpora that teach nothing (their tries are several, and each label is in others' predictions).
_SIGNIFICANT = 2.6
_CONTRARY = 5.0  # so far below chance, an expert tells that most given answers are wrong
_FIRST_RATE = 0.2  # where nothing better is known when the learners first learn
_ROUNDS = 6  # learners and noise model, in turn, at most
_SETTLED = 0.01  # until the noise rate moves no more than this
_SUSPECTED = 0.35  # share of a label that a rule is first supposed to turn into another
_PAIRS = 6  # of labels, those confused most, among which a rule is looked for
_SUSPICIOUS = 4.0  # nats that a rule must add on the records given one of the two labels
_LIKELY = 2  # rules that are then tried on all records, and ideas of these looked at closely
_RULES = 4  # found at most
# Least mean probability of the likeliest label under it: labels that overlap by nature look as if
# one were given for the other, too, but are not told apart for all that.
_SURE = 0.8
# The same where a model's own word was the beginning: one right in 7 of 10 takes half of what it
# does not know for noise (simulated on FPB), and is 77 to 86 % sure.
_SURE_OF_ITSELF = 0.85
_DOUBT = 10.0  # nats that a rule must add to the evidence
_TURNS = 12  # of noise and opinions, where nobody has to be taught, at most
_GAINED = 0.5  # nats of evidence; with less, they have settled
_SAMPLE = 10_000  # records among which rules are looked for
_TELLING = 131_072  # records that tell how labels go wrong; of a larger corpus all are judged by it


def judge_labels(
    panel: Mapping[str, Floats],
    given: Labels,
    classes: int,
    learners: Learners | None = None,
    tuned: Mapping[str, Floats] | None = None,
    *,
    options: Labels | None = None,
    alike: bool = False,
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
    alike: whether an option is the same in every record, as it is wherever there are learners.
    progress: called as `progress(stage, done, total)`, a stage over early where the rate settles.

    An expert that predicts the given labels no better than their frequencies do is muted. A panel
    expert may also predict them *worse* than chance: then most answers are wrong, and the panel
    is what tells; learners alone cannot see noise beyond the plurality and are muted there.
    """
    from threadpoolctl import threadpool_limits

    known = Given(given, classes, options)
    everybody = {name: logs_of(values) for name, values in {**panel, **(tuned or {})}.items()}
    rows, taught = _telling(len(given), learners)
    some = known[rows]
    said = {name: everybody[name][rows] for name in panel}
    skills = {name: skill(values, some) for name, values in said.items()}
    anchors = {n: said[n] for n, z in skills.items() if z > _SIGNIFICANT or z < -_CONTRARY}
    trained = {name: everybody[name][rows] for name in tuned or {}}
    heard = {name: v for name, v in trained.items() if skill(v, some) > _SIGNIFICANT}
    ceiling = 0.95 if anchors else (classes - 1) / classes
    weights = dict.fromkeys([*everybody, *(learners.names if learners else ())], 0.0)
    with threadpool_limits(1):  # two BLAS threads fight over matrices this small
        believed = alike or learners is not None
        team = _Crowd(some, anchors, {}, ceiling, None, progress, believed=believed)
        found = by_panel = team.judge()
        if heard or taught:
            team = _Crowd(some, anchors, heard, ceiling, taught, progress)
            found = team.judge(by_panel.noise if by_panel else None)
        alone = found is by_panel
        if found and len(some) < len(known):
            found = team.on_all(known, everybody, learners, found)
    if found is None:
        return Judgement(np.full(len(given), 0.5), None, weights)
    fit = found.fit
    shares = fit.weights / max(fit.weights.sum(), 1e-12)
    weights |= dict(zip(fit.experts, shares.tolist(), strict=True))
    labels, rate = found.judged()
    wrong = np.clip(1.0 - labels[np.arange(len(given)), given], 0.0, 1.0)
    voting = set(fit.experts).intersection(learners.names if learners else ())
    learned = {name: softmax(values) for name, values in fit.experts.items() if name in voting}
    rate_by_panel = None
    if by_panel and not alone and by_panel.sure >= _SURE:
        rate_by_panel = by_panel.judged()[1]
    return Judgement(wrong, rate, weights, labels, learned, rate_by_panel)


def _telling(total: int, learners: Learners | None) -> tuple[Labels | slice, Learners | None]:
    """The records from which noise is told, of those learners learn from; and learners on them."""
    taught = learners.taught if learners else None
    if taught is None and total <= _TELLING:
        return slice(None), learners
    rows = np.arange(total) if taught is None else taught
    if len(rows) > _TELLING:
        rows = np.sort(np.random.default_rng(0).choice(rows, _TELLING, replace=False))
    return rows, learners.sample(rows) if learners else None


@dataclass(frozen=True)
class _Hearing:
    """What the experts say under one idea of the noise, and what it says of the noise."""

    fit: Fit
    idea: Noise  # that learners were taught under
    expected: Floats  # [C, C] the spread that was expected

    @functools.cached_property
    def noise(self) -> Noise:
        """As it is found; many an idea is given up without a look at it."""
        return Noise(self.fit.rate, self.fit.wrong_labels(self.expected))

    def judged(self) -> tuple[Floats, Estimate]:
        """[N, C] probabilities of the true label, and how many of the given ones are wrong."""
        labels, rates = self.fit.posterior(self.noise.spread)
        return labels, rate_estimate(rates, self.fit.evidence, len(labels))

    @property
    def sure(self) -> float:
        """Mean probability of what is likeliest by the experts alone."""
        return float(self.fit.predicted.max(1).mean())

    @property
    def log_evidence(self) -> float:
        """Logarithm of how likely all of it makes the given labels."""
        return self.fit.log_evidence


class _Crowd:
    """Everyone who judges a corpus: experts who say what they say, and learners who are taught."""

    def __init__(
        self, given: Given, panel: Mapping[str, Floats], tuned: Mapping[str, Floats],
        ceiling: float, learners: Learners | None, progress: Progress | None,
        *, believed: bool = False,
    ) -> None:  # fmt: skip
        self._believed = believed  # whether it is tried what the panel's word alone would mean
        self._given, self._learners, self._ceiling = given, learners, ceiling
        self._others = {**panel, **tuned}
        self._kinds = dict.fromkeys(learners.names if learners else (), "learners")
        self._kinds |= dict.fromkeys(panel, "panel") | dict.fromkeys(tuned, "tuned")
        self._progress = progress
        self._whole = False  # whether these are all of many records
        self._taught: tuple[Floats, dict[str, Floats]] | None = None  # the last transition, and all
        self._stage("learners", _ROUNDS + 1)
        self._able = self._find_able() if learners else []

    def judge(self, idea: Noise | None = None) -> _Hearing | None:
        """Find a noise model and opinions that suit each other; None where nobody can tell.

        `idea`: a noise model that is tried, too.
        """
        first = Noise.possible(_FIRST_RATE, self._given.frequencies)
        found = self._hear(first, first.spread, alone=bool(self._others))
        if found is None:
            return None
        found = self._settle(found)
        if len(self._given) <= _SAMPLE:
            return self._refined(found, idea)
        rng = np.random.default_rng(0)
        some = self._sample(np.sort(rng.choice(len(self._given), _SAMPLE, replace=False)))
        some._stage("sample", _ROUNDS)
        there = some._hear(found.noise, found.expected)
        if there is None:
            return found
        there = some._settle(there)
        told = some._refined(there, idea)
        if told is there:
            return found
        return self._better(found, told.noise, told.expected, "learners")

    def on_all(
        self, given: Given, others: Mapping[str, Floats], learners: Learners | None,
        found: _Hearing,
    ) -> _Hearing | None:  # fmt: skip
        """What is heard as `found` was, from the same experts on all records of the corpus."""
        crowd = copy.copy(self)
        crowd._given, crowd._learners, crowd._taught = given, learners, None
        crowd._others = {name: others[name] for name in self._others}
        crowd._whole = True
        return crowd._hear(found.idea, found.expected)

    def _refined(self, found: _Hearing, idea: Noise | None) -> _Hearing:
        """What is heard under other ideas of the noise, where these explain more."""
        # Where only some of many labels are taken for each other, noise that is even among all
        # makes the given labels less likely than experts who are unsure: none would be found.
        predicted = found.fit.predicted
        confusions = Noise.of(self._taken(predicted), predicted.mean(0))
        found = self._better(found, confusions, confusions.spread, "confusions")
        found = self._with_rules(found)
        if idea is not None:
            found = self._better(found, idea, idea.spread, "models")
        if self._believed:
            word = self._at_their_word()
            found = word if word and _convincing(word, found, _SURE_OF_ITSELF) else found
        return found

    def _better(self, found: _Hearing, noise: Noise, expected: Floats, stage: str) -> _Hearing:
        """What is heard under another noise, if that convinces."""
        self._stage(stage, _ROUNDS)
        rival = self._hear(noise, expected)
        if rival is None:
            return found
        rival = self._settle(rival)
        return rival if _convincing(rival, found) else found

    def _at_their_word(self) -> _Hearing | None:
        """Noise and opinions in turn, beginning as if the panel were right wherever it contradicts.

        What a weaker model has labelled goes wrong by many rules, of which each explains little.
        """
        said = np.mean([np.exp(values) for values in self._others.values()], axis=0)
        noise = Noise.of(self._taken(said), said.mean(0))
        expected = Noise.even(0.0, self._given.classes).spread
        found: _Hearing | None = None
        for _ in range(_TURNS):
            later = self._hear(noise, expected)
            if later is None or (found and later.log_evidence < found.log_evidence + _GAINED):
                break
            found, noise = later, later.noise
        return found

    def _taken(self, said: Floats) -> Floats:
        """[C, C] of what is said to be z the share given as y; from probabilities [N, C]."""
        given = self._given
        taken = np.stack([said[given.labels == y].sum(0) for y in range(given.classes)], axis=1)
        total = taken.sum(1, keepdims=True)
        return np.where(total > 0, taken / np.maximum(total, 1e-12), np.eye(given.classes))

    def _with_rules(self, found: _Hearing) -> _Hearing:
        """Suppose that a label is often given for another, and see what makes that likely.

        Learners who trust the labels learn a rule with them and find nothing to object to. Taught
        that a third of label a is called b, they explain the given labels better if that is so.
        """
        for _ in range(_RULES):
            tries = self._suspected(found)
            self._stage("rules", len(tries) + _LIKELY * (_ROUNDS - 1))
            shares = found.fit.predicted.mean(0)
            noises = [_turned(found.noise.transition, rules, shares) for rules in tries]
            heard = [one for noise in noises if (one := self._hear(noise, noise.spread))]
            heard.sort(key=lambda one: one.log_evidence, reverse=True)
            rivals = [self._settle(one) for one in heard[:_LIKELY]]
            rival = max(rivals, key=lambda one: one.log_evidence, default=found)
            if not _convincing(rival, found):
                break
            found = rival
        return found

    def _suspected(self, found: _Hearing) -> list[list[tuple[int, int]]]:
        """Rules (right, wrong) that may hold together, a list for every idea of that.

        Each is tried on the records given one of the two: little work, however many labels there
        are. Several hide each other, so where one is likely all are supposed at once, too.
        """
        transition = found.noise.transition
        pairs = self._confused(found)
        self._stage("pairs of labels", 3 * len(pairs))
        gains: dict[tuple[int, int], float] = {}
        for pair in pairs:
            two = self._of_two(*pair)
            kept = float(np.mean([transition[y, y] / transition[y, pair].sum() for y in pair]))
            plain = Noise.even(1.0 - kept, 2)
            usual = two._hear(plain, plain.spread)
            if usual is None:
                continue
            shares = usual.fit.predicted.mean(0)
            for right, wrong in ((0, 1), (1, 0)):
                noise = _turned(usual.noise.transition, [(right, wrong)], shares)
                tried = two._hear(noise, noise.spread)
                if tried:
                    gains[pair[right], pair[wrong]] = tried.log_evidence - usual.log_evidence
        ranked = sorted(gains, key=gains.__getitem__, reverse=True)
        likely = [rule for rule in ranked if gains[rule] > _SUSPICIOUS]
        if not likely:
            return []
        best = list({rule[0]: rule for rule in reversed(ranked)}.values())  # one of every label
        helpful = [rule for rule in best if gains[rule] > 0]
        together = [helpful, best] if len(helpful) < len(best) else [best]
        return [[rule] for rule in likely[:_LIKELY]] + [some for some in together if len(some) > 1]

    def _confused(self, found: _Hearing) -> list[tuple[int, int]]:
        """The pairs of labels that the experts take for each other most."""
        labels = np.flatnonzero(self._given.frequencies).tolist()
        taken = self._taken(found.fit.predicted)
        taken += taken.T
        pairs = itertools.combinations(labels, 2)
        return heapq.nlargest(_PAIRS, pairs, key=lambda pair: float(taken[pair]))

    def _settle(self, found: _Hearing) -> _Hearing:
        """Learners and noise model, in turn, until the noise rate hardly moves."""
        for _ in range(_ROUNDS - 1 if self._able else 0):
            before = found.noise.rate
            later = self._hear(found.noise, found.expected)
            if later is None:
                break  # the learners fell silent: what they said before counts
            found = later
            if abs(found.noise.rate - before) < _SETTLED:
                break
        return found

    def _hear(self, noise: Noise, expected: Floats, alone: bool = False) -> _Hearing | None:
        """Everyone under one idea of the noise; without learners where the others are `alone`."""
        taught = self._teach(noise.transition) if self._able and not alone else {}
        experts = self._others | {name: taught[name] for name in self._able if name in taught}
        if not experts:
            return None
        fit = Fit(self._kinds, experts, self._given, noise.spread, self._ceiling)
        return _Hearing(fit, noise, expected)

    def _teach(self, transition: Floats) -> dict[str, Floats]:
        if self._taught is None or not np.array_equal(self._taught[0], transition):
            progress = self._progress if self._whole else None
            found = self._learners.predict(transition, progress) if self._learners else {}
            self._taught = transition, {name: logs_of(values) for name, values in found.items()}
            if self._progress is not None and not self._whole:
                self._progress(self._doing, next(self._passes), self._total)
        return self._taught[1]

    def _find_able(self) -> list[str]:
        """Names of the learners to hear; none where not one of them beats chance.

        Tried as if much and as if little were wrong, for under the wrong noise rate a regression
        learns less. All learn from the same records: what one of them proves, that these can be
        learnt, no other has to prove again.
        """
        classes = self._given.classes
        skills: dict[str, float] = {}
        for rate in (0.75 * (classes - 1) / classes, _FIRST_RATE):
            for name, values in self._teach(Noise.even(rate, classes).transition).items():
                found = skill(values, self._given)
                skills[name] = max(found, skills.get(name, found))
        proven = max(skills.values(), default=0.0) > _SIGNIFICANT
        return [name for name, found in skills.items() if proven and found > 0]

    def _sample(self, rows: Labels, labels: tuple[int, int] | None = None) -> _Crowd:
        """The same crowd on some of the records."""
        some = copy.copy(self)
        some._given, some._taught = self._given[rows], None
        some._others = {name: values[rows] for name, values in self._others.items()}
        some._learners = self._learners.sample(rows, labels) if self._learners else None
        return some

    def _of_two(self, first: int, second: int) -> _Crowd:
        """The same crowd on the records given one of two labels, as if there were no others.

        Those that lack one of the two are left out: there neither is given for the other.
        """
        given = self._given
        both = np.isin(given.labels, (first, second)) & ~given.lacking[:, (first, second)].any(1)
        rows = np.flatnonzero(both)
        some = self._sample(rows, (first, second))
        some._given = Given((given.labels[rows] == second).astype(np.int64), 2)
        for name, values in some._others.items():
            said = values[:, (first, second)]
            some._others[name] = said - logsumexp(said, axis=1, keepdims=True)
        return some

    def _stage(self, doing: str, total: int) -> None:
        """What progress is told."""
        self._doing, self._total, self._passes = doing, total, itertools.count(1)


def _convincing(rival: _Hearing, found: _Hearing, sure: float = _SURE) -> bool:
    """Whether rules were found: they explain more, and leave the experts sure."""
    gain = rival.log_evidence - found.log_evidence
    return gain >= _DOUBT and rival.sure >= sure


def _turned(transition: Floats, rules: list[tuple[int, int]], shares: Floats) -> Noise:
    """Noise in which more of one label is given as another; shares: [C] of the true labels."""
    turned = transition.copy()
    for right, wrong in rules:
        turned[right] *= 1.0 - _SUSPECTED
        turned[right, wrong] += _SUSPECTED
    return Noise.of(turned, shares)
