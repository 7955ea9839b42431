"""Experts that learn from the corpus itself, out of fold: no record judges itself.

For corpora whose records share one set of options. The regression is fitted on the given labels
through a model of their noise: it predicts the true label z, and a transition matrix T[z, y] turns
that into the label y that was given ("forward correction", Patrini et al. 2017, arXiv 1609.03683).
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize

from robustft.crowd.judgement import Floats
from robustft.crowd.neighbours import (
    Features,
    Labels,
    Progress,
    distinct,
    drawn,
    near_copies,
    neighbour_vote,
)

_FOLDS = 5
_CUTS = 2
_PENALTY = 1.0  # half the squared norm of the coefficients is added to the summed log-loss
_TOLERANCE = 1e-5  # relative to the log-loss; less moves no verdict
_FIT_ROWS = 40_000  # a fold is fitted on at most this many rows
_FITS = 4  # folds fitted at a time, at most: each holds its rows
_CHUNK = 16_384  # rows predicted at once
_WORDS = 1 << 16
# Coefficients of words, of all labels together: beyond them only time grows. MMLU's 57 subjects are
# told apart as well by 1,150 words as by all 42,000.
_COEFFICIENTS = 1 << 17
_WORD_ROWS = 100_000  # of a larger corpus words are not counted: memory stays bounded
_TOKEN = r"\w+|[^\w\s]"


class Corpus(Protocol):
    """The records of a corpus by position, possibly in several files."""

    threads: int | None  # for searches among its embeddings and for fits; None: all cores

    def __getitem__(self, positions: NDArray[np.int64], /) -> NDArray[np.float32]:
        """Gather embeddings [len(positions), d]."""
        ...

    def questions(self, positions: NDArray[np.int64]) -> Iterator[str]:
        """Yield the text of each question."""
        ...


def word_features(
    texts: Iterable[str], questions: Labels | None = None, most: int = _WORDS
) -> Features | None:
    """[N, d] CSR of unit-length TF-IDF rows of hashed words and pairs; None without words.

    Words of a single text teach nothing about another and are left out; of the others the `most`
    frequent stay. questions: [N] numbers, equal where texts are copies, which count once.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    hasher: Any = HashingVectorizer(
        n_features=_WORDS, ngram_range=(1, 2), token_pattern=_TOKEN, alternate_sign=False,
        norm=None, dtype=np.float32,
    )  # fmt: skip
    counts = hasher.transform(texts)
    _, first = distinct(questions, counts.shape[0])
    seen = np.bincount(counts[first].indices, minlength=_WORDS)
    kept = np.flatnonzero(seen > 1)
    if len(kept) == 0:
        return None
    if len(kept) > most:
        kept = np.sort(kept[np.argsort(-seen[kept], kind="stable")[:most]])
    counts = counts[:, kept].astype(np.float64)
    counts.data = 1.0 + np.log(counts.data)
    weighted = counts.multiply(1.0 + np.log((1 + len(first)) / (1 + seen[kept]))).tocsr()
    norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(1)).ravel())
    return sparse.diags_array(1.0 / np.maximum(norms, 1e-12)).dot(weighted).tocsr()


class _Gathered:
    """Some records' embeddings, read when they are asked for: a large corpus stays on disk."""

    def __init__(self, rows: Features | Corpus, positions: NDArray[np.int64]) -> None:
        self._rows, self._positions = rows, positions

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._rows[self._positions[rows]]
        return found


def _rows(values: Features, rows: Labels) -> Features:
    """Some rows; many of those that stay on disk stay there."""
    if isinstance(values, _Gathered) and len(rows) > _FIT_ROWS:
        return _Gathered(values, rows)
    return values[rows]


class Beside:
    """The columns of several matrices as one; each stays dense or sparse, as it came."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts
        self._edges = np.cumsum([0, *(part.shape[1] for part in parts)]).tolist()
        self.shape = (parts[0].shape[0], self._edges[-1])

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> Beside:
        return Beside(*(part[rows] for part in self._parts))

    def astype(self, dtype: type[np.float32]) -> Beside:
        """The same in another dtype."""
        return Beside(*(part.astype(dtype, copy=False) for part in self._parts))

    def products(self, weights: Floats) -> Floats:
        """[C, N] products of the rows with those of weights [C, d]."""
        edges = zip(self._edges, self._edges[1:], strict=False)
        right = weights.T.astype(np.float32)
        products = [part @ right[a:b] for part, (a, b) in zip(self._parts, edges, strict=True)]
        return np.ascontiguousarray(sum(products).T, np.float64)

    def weighted_sums(self, weights: Floats) -> Floats:
        """[C, d] sums of the rows, with weights [C, N]."""
        left = weights.astype(np.float32)
        return np.concatenate(
            [(part.T @ left.T).T if sparse.issparse(part) else left @ part for part in self._parts],
            axis=1,
        )


class Learners:
    """Regressions and a neighbour vote on the given labels of one corpus.

    Of more than `VOTERS` questions so many are learnt from, and `taught` are the records that ask
    these; None where all are.

    Parameters
    ----------
    embeddings: [N, d] unit-length rows.
    given: [N] labels in [0, classes).
    words: [N, v] from `word_features`, or None.
    questions: [N] numbers, equal where the same is asked: such records share a fold and do not vote
        on each other, for a copy of a record knows its label. None: no two are equal. Records that
        ask nearly the same are held for such where their labels look copied (`near_copies`).
    threads: of searches and fits; None for one per core.
    progress: called as `progress(stage, done, total)`, in records.
    """

    taught: Labels | None = None

    def __init__(
        self, embeddings: Features, given: Labels, classes: int, words: Features | None = None, *,
        questions: Labels | None = None, seed: int = 0, threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.taught = drawn(questions, len(given), seed)
        joined: Labels | None = None
        if self.taught is None:
            questions = near_copies(embeddings, given, questions, threads, progress)
        else:
            asked, _ = distinct(questions, len(given))
            mine = asked[self.taught]
            some = _Gathered(embeddings, self.taught)
            merged = near_copies(some, given[self.taught], mine, threads, progress)
            if merged is not None and merged is not mine:
                joined = asked + len(given)  # unlike those that `merged` has
                joined[self.taught] = merged
                questions = joined
        self._votes, asks = neighbour_vote(
            embeddings, given, classes, questions=questions, voters=self.taught,
            joining=joined is not None, threads=threads, progress=progress,
        )  # fmt: skip
        if joined is not None:
            questions = np.where(asks >= 0, asks, joined)
        self._given, self._seed, self._questions = given, seed, questions
        self._threads = threads
        self.features: dict[str, Features] = {"regression": embeddings}
        if words is not None:
            self.features["regression with words"] = Beside(embeddings, words.astype(np.float32))
        self.names = (*self.features, "neighbours")

    @classmethod
    def of(
        cls, corpus: Corpus, positions: NDArray[np.int64], given: Labels, classes: int,
        questions: Labels | None = None, progress: Progress | None = None,
    ) -> Learners:  # fmt: skip
        """Learners on the records at `positions` of a corpus."""
        rows: Features = _Gathered(corpus, positions)
        words = None
        if len(positions) <= _WORD_ROWS:
            rows = corpus[positions]
            most = max(_COEFFICIENTS // classes, 1)
            words = word_features(corpus.questions(positions), questions, most)
        return cls(
            rows, given, classes, words, questions=questions, threads=corpus.threads,
            progress=progress,
        )  # fmt: skip

    def predict(self, transition: Floats, progress: Progress | None = None) -> dict[str, Floats]:
        """Expert -> [N, C] probabilities of the true label, given how labels go wrong.

        The neighbours vote with the labels as given and would mislead where a wrong label is
        likelier than the right one; there they are silent. progress: called in records, by learner.
        """
        found = {}
        for name, rows in self.features.items():
            found[name] = out_of_fold(
                rows, self._given, transition, self._seed, questions=self._questions,
                taught=self.taught, threads=self._threads,
                told=functools.partial(progress, name) if progress else None,
            )  # fmt: skip
        honest = bool((transition.argmax(1) == np.arange(len(transition))).all())
        return found | ({"neighbours": self._votes} if honest else {})

    def sample(self, rows: Labels, labels: tuple[int, int] | None = None) -> Learners:
        """The same for the records at `rows`; those near them keep their votes.

        labels: two that alone are given to these records and become labels 0 and 1.
        """
        some = copy.copy(self)
        some.features = {name: _rows(values, rows) for name, values in self.features.items()}
        if self.taught is not None:
            some.taught = np.flatnonzero(np.isin(rows, self.taught))
        some._given, some._votes = self._given[rows], self._votes[rows]
        some._questions = None if self._questions is None else self._questions[rows]
        if labels is not None:
            some._given = (some._given == labels[1]).astype(np.int64)
            some._votes = some._votes[:, labels] / some._votes[:, labels].sum(1, keepdims=True)
        return some


def out_of_fold(
    features: Features,
    given: Labels,
    transition: Floats,
    seed: int = 0,
    penalty: float = _PENALTY,
    questions: Labels | None = None,
    taught: Labels | None = None,
    threads: int | None = None,
    told: Callable[[int, int], object] | None = None,
) -> Floats:
    """[N, C] probabilities of the true label from regressions that did not see the question.

    Averaged over two ways of cutting the folds: less depends on the luck of the cut.
    taught: the records to learn from; all when None.
    threads: fit as many folds at a time, a few at most; None for one per core.
    told: called as `told(done, total)`, in records and every cut anew.
    """

    def fit(train: Labels) -> Floats:
        return fit_regression(features[train], given[train], transition, penalty)

    cuts: list[tuple[Labels, list[Future[Floats]]]] = []
    pool = ThreadPoolExecutor(min(threads or os.cpu_count() or 1, _FITS))
    try:
        for cut in range(_CUTS if len(given) <= _FIT_ROWS else 1):
            rng = np.random.default_rng([seed, cut])
            fold = _folds(given, rng, questions)
            fits = [pool.submit(fit, rows) for rows in _training_rows(fold, taught, rng)]
            cuts.append((fold, fits))
        found = [_predicted(features, fold, fits, len(transition), told) for fold, fits in cuts]
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted run does not wait for them all
    return np.asarray(sum(found)) / len(cuts)


def _training_rows(
    fold: Labels, taught: Labels | None, rng: np.random.Generator
) -> Iterator[Labels]:
    """Yield the rows outside of each fold, of many of them some."""
    taught = np.arange(len(fold)) if taught is None else taught
    for left_out in range(int(fold.max(initial=-1)) + 1):
        rows = taught[fold[taught] != left_out]
        if len(rows) > _FIT_ROWS:
            rows = np.sort(rng.choice(rows, _FIT_ROWS, replace=False))
        yield rows


def _predicted(
    features: Features,
    fold: Labels,
    fits: Sequence[Future[Floats]],
    classes: int,
    told: Callable[[int, int], object] | None,
) -> Floats:
    """[N, C] of every record by the regression that did not see its fold."""
    predicted = np.empty((len(fold), classes))
    for low in range(0, len(fold), _CHUNK):
        rows, owner = features[low : low + _CHUNK], fold[low : low + _CHUNK]
        for number, fit in enumerate(fits):
            mine = np.flatnonzero(owner == number)
            scores = _scores(_beside(rows[mine]), fit.result())
            predicted[low + mine] = softmax(scores.T)
        if told is not None:
            told(min(low + _CHUNK, len(fold)), len(fold))
    return predicted


def _folds(given: Labels, rng: np.random.Generator, questions: Labels | None) -> Labels:
    """[N] fold of each record, every label spread evenly over the folds.

    Otherwise a label frequent in the fold left out is rare in what is learnt from: predictions
    would run against the very labels that they are to predict.
    """
    group, first = distinct(questions, len(given))
    labels = given[first]
    order = rng.permutation(len(first))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty_like(order)
    fold[order] = np.arange(len(order)) % _FOLDS
    return fold[group]


def fit_regression(
    features: Features, given: Labels, transition: Floats, penalty: float = _PENALTY
) -> Floats:
    """[C, d + 1] coefficients and intercepts, fitted through the noise model: they minimise.

        -sum_i log(sum_z softmax(W x_i + b)[z] T[z, y_i]) + penalty |W|^2 / 2.

    With T the identity this is multinomial logistic regression (scikit-learn's C = 1 / penalty).
    """
    features = _beside(features).astype(np.float32)
    classes, (_, width) = len(transition), features.shape
    likelihood = transition[:, given]  # [C, N] p(y_i | z)

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights = flat.reshape(classes, width + 1)
        surprise, off = log_loss(_scores(features, weights), likelihood)
        gradient = np.empty_like(weights)
        gradient[:, :-1] = features.weighted_sums(off) + penalty * weights[:, :-1]
        gradient[:, -1] = off.sum(1)
        size = 0.5 * penalty * float((weights[:, :-1] ** 2).sum())
        return size + surprise, gradient.ravel()

    start = np.zeros(classes * (width + 1))
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 60, "ftol": _TOLERANCE}
    )
    return np.asarray(found.x).reshape(classes, width + 1)


def softmax(scores: Floats) -> Floats:
    """Along the last axis."""
    shifted = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


def log_loss(scores: Floats, likelihood: Floats) -> tuple[float, Floats]:
    """-sum_i log(sum_z softmax(scores)[z, i] likelihood[z, i]), and its gradient [C, N].

    scores: [C, N], overwritten. Records come last: over an axis of a few labels numpy is slow.
    likelihood: [C, N] p(y_i | z).
    """
    scores -= scores.max(0)
    predicted = np.exp(scores, out=scores)
    predicted /= predicted.sum(0)
    joint = predicted * likelihood
    evidence = joint.sum(0)
    joint /= evidence
    predicted -= joint
    return -float(np.log(evidence).sum()), predicted


def _scores(features: Beside, weights: Floats) -> Floats:
    """[C, N] from coefficients and intercepts [C, d + 1]."""
    return features.products(weights[:, :-1]) + weights[:, -1:]


def _beside(features: Features) -> Beside:
    return features if isinstance(features, Beside) else Beside(features)
