"""Experts as a crowd: how far each may be trusted is learnt from the corpus, without truth.

For corpora whose answers come from one fixed set of labels ("negative", "neutral", "positive").
Two cheap experts are added to the panel's, both out of fold, so that no record judges itself: a
logistic regression on sentence embeddings, and a vote of the nearest neighbours. Experts are
weighted by how much better than the commonest label they predict the given answers (CROWDLAB,
Goh et al. 2022, arXiv 2210.06812, eq. 6 and 8): one that does no better is muted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustft.retrieval import CosineKNN

_FOLDS = 5
_STRENGTHS = (0.1, 1.0, 10.0)  # inverse regularisation, chosen by log-loss on the given labels
_FIT_ROWS = 40_000  # the regression is fitted on at most this many rows a fold
_VOTERS = 20
Probabilities = NDArray[np.float64]  # [N, C]


class Rows(Protocol):
    """Embeddings of a whole corpus, possibly in several files."""

    def __getitem__(self, positions: NDArray[np.int64], /) -> NDArray[np.float32]:
        """Gather [len(positions), d]."""
        ...

    def index(self) -> CosineKNN:
        """Return an index of all of them, each found under its position."""
        ...


@dataclass(frozen=True, slots=True)
class Crowd:
    """What the crowd thinks of every record."""

    probabilities: Probabilities  # [N, C], rows sum to one
    weights: Mapping[str, float]  # expert -> trust, 0 = muted; sums to one unless all are muted

    def doubt(self, given: NDArray[np.int64]) -> NDArray[np.float64]:
        """[N] the probability that the given label is wrong."""
        return 1.0 - self.probabilities[np.arange(len(given)), given]


def regression_expert(
    embeddings: NDArray[np.float32] | Rows,
    given: NDArray[np.int64],
    classes: int,
    seed: int = 0,
) -> Probabilities:
    """Out-of-fold probabilities of a multinomial logistic regression on the given labels.

    Parameters
    ----------
    embeddings: [N, d] unit-length rows.
    given: [N] labels in [0, classes).

    Returns:
    -------
    [N, classes]; the strength of regularisation is the one with the lowest log-loss on the given
    labels, out of fold. A fold with a single label yields the label frequencies.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(seed)
    fold = rng.permutation(len(given)) % _FOLDS
    best: Probabilities = np.tile(label_frequencies(given, classes), (len(given), 1))
    best_loss = log_loss(best, given)
    with threadpool_limits(1):  # two BLAS threads fight over matrices this small
        for strength in _STRENGTHS:
            found = best.copy()
            for number in range(min(_FOLDS, len(given))):
                train = np.flatnonzero(fold != number)
                if len(train) > _FIT_ROWS:
                    train = rng.choice(train, _FIT_ROWS, replace=False)
                if len(np.unique(given[train])) < 2:
                    continue
                model: Any = LogisticRegression(C=strength, max_iter=300)
                model.fit(embeddings[train], given[train])
                test = np.flatnonzero(fold == number)
                found[test] = 0.0
                found[np.ix_(test, model.classes_)] = model.predict_proba(embeddings[test])
            loss = log_loss(found, given)
            if loss < best_loss:
                best, best_loss = found, loss
    return best


def neighbour_expert(index: CosineKNN, given: NDArray[np.int64], classes: int) -> Probabilities:
    """[N, classes] cosine-weighted votes of each row's nearest other rows, smoothed by one vote."""
    ids, cosines = index.self_search(min(_VOTERS, max(len(given) - 1, 1)))
    votes = np.tile(label_frequencies(given, classes), (len(given), 1))
    rows = np.arange(len(given))
    for near, cosine in zip(ids.T, cosines.T, strict=True):
        real = near >= 0
        np.add.at(
            votes, (rows[real], given[near[real]]), np.clip(cosine[real].astype(np.float64), 0, 1)
        )
    return np.asarray(votes / votes.sum(1, keepdims=True))


def pool(experts: Mapping[str, Probabilities], given: NDArray[np.int64], classes: int) -> Crowd:
    """Weigh experts by what they know of the given labels beyond their frequencies.

    The trust of an expert is 1 - error / error of always saying the commonest label, at least 0;
    its error is taken at the upper end of a 95 % interval, so that chance earns no trust.
    """
    frequencies = label_frequencies(given, classes)
    baseline = max(1.0 - float(frequencies.max()), 1e-9)
    trust = {}
    for name, values in experts.items():
        error = float((values.argmax(1) != given).mean())
        error += 1.96 * (error * (1.0 - error) / max(len(given), 1)) ** 0.5
        trust[name] = max(0.0, 1.0 - error / baseline)
    total = sum(trust.values())
    if total == 0:
        return Crowd(np.tile(frequencies, (len(given), 1)), dict.fromkeys(trust, 0.0))
    weights = {name: value / total for name, value in trust.items()}
    pooled = np.zeros((len(given), classes))
    for name, weight in weights.items():
        if weight:
            pooled += weight * experts[name]
    return Crowd(pooled / pooled.sum(1, keepdims=True), weights)


def label_frequencies(given: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """[classes] share of each label."""
    return np.bincount(given, minlength=classes) / max(len(given), 1)


def log_loss(probabilities: Probabilities, given: NDArray[np.int64]) -> float:
    """Mean negative log-probability of the given labels, nats."""
    picked = probabilities[np.arange(len(given)), given]
    return float(-np.log(np.clip(picked, 1e-12, 1.0)).mean())
