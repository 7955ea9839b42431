"""Experts that learn from the corpus itself, out of fold: no record judges itself.

For corpora whose records share one set of options. The regression is fitted on the given labels
through a model of their noise: it predicts the true label z, and a transition matrix T[z, y] turns
that into the label y that was given ("forward correction", Patrini et al. 2017, arXiv 1609.03683).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize

from robustft.crowd.judgement import Floats
from robustft.retrieval import CosineKNN

_FOLDS = 5
_CUTS = 2
_PENALTY = 1.0  # half the squared norm of the coefficients is added to the summed log-loss
_TOLERANCE = 1e-5  # relative to the log-loss; less moves no verdict
_FIT_ROWS = 40_000  # a fold is fitted on at most this many rows
_FITS = 4  # folds fitted at a time, at most: each holds its rows
_CHUNK = 16_384  # rows predicted at once
_VOTES = 20  # neighbours that each record asks
VOTERS = 131_072  # of a larger corpus so many records, drawn at random, are neighbours
_COPY = 0.98  # cosine of questions that differ in a comma or a word
# Of such questions the share that bears the label of the nearest other one, beyond the share that
# would by chance, from which on labels are taken to be copied with the texts. Where 3 % of labels
# are wrong by themselves it is 0.9; of a label that nearly all bear, agreement tells nothing.
_COPIED = 0.95
_FEW_COPIES = 20  # of fewer the labels may agree by chance
_ASKED = 4096  # questions whose nearest other one tells whether there are such copies
_WORDS = 1 << 16
# Coefficients of words, of all labels together: beyond them only time grows. MMLU's 57 subjects are
# told apart as well by 1,150 words as by all 42,000.
_COEFFICIENTS = 1 << 17
_WORD_ROWS = 100_000  # of a larger corpus words are not counted: memory stays bounded
_TOKEN = r"\w+|[^\w\s]"

Labels = NDArray[np.int64]
Features = Any  # [N, d]: dense, scipy CSR, `Beside`, or what gathers such rows by their numbers
Progress: TypeAlias = Callable[[str, int, int], object]  # what is done, how much of it, of how much


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
    _, first = _distinct(questions, counts.shape[0])
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

    def __init__(self, corpus: Corpus, positions: NDArray[np.int64]) -> None:
        self._corpus, self._positions = corpus, positions

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        return self._corpus[self._positions[rows]]


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

    Parameters
    ----------
    embeddings: [N, d] unit-length rows.
    given: [N] labels in [0, classes).
    words: [N, v] from `word_features`, or None.
    questions: [N] numbers, equal where the same is asked: such records share a fold and do not vote
        on each other, for a copy of a record knows its label. None: no two are equal. Records that
        ask nearly the same are held for such where their labels look copied (`near_copies`).
    threads: of searches and fits; None for one per core.
    progress: called as `progress("neighbours", done, total)`, in records.
    """

    def __init__(
        self, embeddings: Features, given: Labels, classes: int, words: Features | None = None, *,
        questions: Labels | None = None, seed: int = 0, threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        questions = near_copies(embeddings, given, questions, threads)
        self._given, self._seed, self._questions = given, seed, questions
        self._threads = threads
        self.features: dict[str, Features] = {"regression": embeddings}
        if words is not None:
            self.features["regression with words"] = Beside(embeddings, words.astype(np.float32))
        self._votes = neighbour_vote(
            embeddings, given, classes, questions=questions, seed=seed, threads=threads,
            progress=progress,
        )  # fmt: skip
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

    def predict(self, transition: Floats) -> dict[str, Floats]:
        """Expert -> [N, C] probabilities of the true label, given how labels go wrong.

        The neighbours vote with the labels as given and would mislead where a wrong label is
        likelier than the right one; there they are silent.
        """
        found = {}
        for name, rows in self.features.items():
            found[name] = out_of_fold(
                rows, self._given, transition, self._seed, questions=self._questions,
                threads=self._threads,
            )  # fmt: skip
        honest = bool((transition.argmax(1) == np.arange(len(transition))).all())
        return found | ({"neighbours": self._votes} if honest else {})

    def sample(self, rows: Labels, labels: tuple[int, int] | None = None) -> Learners:
        """The same for the records at `rows`; those near them keep their votes.

        labels: two that alone are given to these records and become labels 0 and 1.
        """
        some = copy.copy(self)
        some.features = {name: values[rows] for name, values in self.features.items()}
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
    threads: int | None = None,
) -> Floats:
    """[N, C] probabilities of the true label from regressions that did not see the question.

    Averaged over two ways of cutting the folds: less depends on the luck of the cut.
    threads: fit as many folds at a time, a few at most; None for one per core.
    """

    def fit(train: Labels) -> Floats:
        return fit_regression(features[train], given[train], transition, penalty)

    cuts: list[tuple[Labels, list[Future[Floats]]]] = []
    pool = ThreadPoolExecutor(min(threads or os.cpu_count() or 1, _FITS))
    try:
        for cut in range(_CUTS if len(given) <= _FIT_ROWS else 1):
            rng = np.random.default_rng([seed, cut])
            fold = _folds(given, rng, questions)
            fits = [pool.submit(fit, rows) for rows in _training_rows(fold, rng)]
            cuts.append((fold, fits))
        found = [_predicted(features, fold, fits, len(transition)) for fold, fits in cuts]
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted run does not wait for them all
    return np.asarray(sum(found)) / len(cuts)


def _training_rows(fold: Labels, rng: np.random.Generator) -> Iterator[Labels]:
    """Yield the rows outside of each fold, of many of them some."""
    for left_out in range(int(fold.max(initial=-1)) + 1):
        rows = np.flatnonzero(fold != left_out)
        if len(rows) > _FIT_ROWS:
            rows = np.sort(rng.choice(rows, _FIT_ROWS, replace=False))
        yield rows


def _predicted(
    features: Features, fold: Labels, fits: Sequence[Future[Floats]], classes: int
) -> Floats:
    """[N, C] of every record by the regression that did not see its fold."""
    predicted = np.empty((len(fold), classes))
    for low in range(0, len(fold), _CHUNK):
        rows, owner = features[low : low + _CHUNK], fold[low : low + _CHUNK]
        for number, fit in enumerate(fits):
            mine = np.flatnonzero(owner == number)
            scores = _scores(_beside(rows[mine]), fit.result())
            predicted[low + mine] = softmax(scores.T)
    return predicted


def _folds(given: Labels, rng: np.random.Generator, questions: Labels | None) -> Labels:
    """[N] fold of each record, every label spread evenly over the folds.

    Otherwise a label frequent in the fold left out is rare in what is learnt from: predictions
    would run against the very labels that they are to predict.
    """
    group, first = _distinct(questions, len(given))
    labels = given[first]
    order = rng.permutation(len(first))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty_like(order)
    fold[order] = np.arange(len(order)) % _FOLDS
    return fold[group]


def _distinct(questions: Labels | None, total: int) -> tuple[Labels, Labels]:
    """([N] number of each record's question, by first appearance; [G] the record it appears in)."""
    if questions is None:
        return np.arange(total), np.arange(total)
    _, first, group = np.unique(questions, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return number[group], first[order]


def near_copies(
    embeddings: Features, given: Labels, questions: Labels | None = None, threads: int | None = None
) -> Labels | None:
    """[N] numbers as `questions`, equal also where nearly the same is asked.

    Only where such questions bear the same label more often than if each had been labelled by
    itself: then an error was copied with the text, and every copy would confirm it. Labels given
    one by one are left to teach each other, and so is a corpus of more than `VOTERS` questions.
    """
    group, first = _distinct(questions, len(given))
    if not 1 < len(first) <= VOTERS:
        return questions
    rows = embeddings[first]
    if not _copied(rows, given[first], threads):
        return questions
    leader = np.arange(len(first))
    leaders = leader
    while len(leaders) > 1:  # of many copies not all are among the nearest of one
        index = CosineKNN(rows[leaders], threads=threads)
        ids, _ = index.self_search(min(_VOTES, len(leaders) - 1), threshold=_COPY)
        joined = np.arange(len(leaders))
        for row in np.flatnonzero(ids[:, 0] >= 0).tolist():
            heads = np.unique(joined[ids[row][(ids[row] >= 0) & (ids[row] < row)]])
            cosines = rows[leaders[heads]] @ rows[leaders[row]]
            if (cosines > _COPY).any():
                joined[row] = heads[cosines.argmax()]
        own = np.flatnonzero(joined == np.arange(len(leaders)))
        if len(own) == len(leaders):
            break
        place = np.empty(len(first), np.int64)
        place[leaders] = leaders[joined]
        leader = place[leader]
        leaders = leaders[own]
    return leader[group]


def _copied(rows: Features, labels: Labels, threads: int | None) -> bool:
    """Whether labels were copied with their texts, by what is nearest to some of these."""
    some = np.arange(len(rows))
    if len(rows) > _ASKED:
        some = np.sort(np.random.default_rng(0).choice(len(rows), _ASKED, replace=False))
    ids, _ = CosineKNN(rows, threads=threads).search(rows[some], 1, exclude=some, threshold=_COPY)
    near = np.flatnonzero(ids[:, 0] >= 0)
    if len(near) < _FEW_COPIES:
        return False
    own = labels[some[near]]
    by_chance = float(((np.bincount(own) / len(own)) ** 2).sum())
    different = float((labels[ids[near, 0]] != own).mean())
    return different <= (1.0 - _COPIED) * (1.0 - by_chance)


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


def neighbour_vote(
    features: Features,
    given: Labels,
    classes: int,
    *,
    questions: Labels | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Floats:
    """[N, C] cosine-weighted votes of the questions nearest to each row's, smoothed by one vote.

    A question has one vote, however many records ask it: their labels share it.
    """
    total = len(given)
    group, first = _distinct(questions, total)
    voters = np.arange(len(first))
    if len(voters) > VOTERS:
        rng = np.random.default_rng(seed)
        voters = np.sort(rng.choice(len(voters), VOTERS, replace=False))
    place = np.full(len(first), -1)  # of each question among the voters
    place[voters] = np.arange(len(voters))
    asks = place[group]
    ballots = np.zeros((len(voters), classes))
    np.add.at(ballots, (asks[asks >= 0], given[asks >= 0]), 1.0)
    ballots /= ballots.sum(1, keepdims=True)
    index = CosineKNN(features[first[voters]], threads=threads)
    votes = np.tile(label_frequencies(given, classes), (total, 1))
    for low in range(0, total, _CHUNK):
        rows = np.arange(low, min(low + _CHUNK, total))
        near, cosines = index.search(
            features[rows], min(_VOTES, max(len(voters) - 1, 1)), exclude=asks[rows]
        )
        for ids, cosine in zip(near.T, cosines.T, strict=True):
            real = ids >= 0
            trust = np.clip(cosine[real].astype(np.float64), 0, 1)
            votes[rows[real]] += trust[:, None] * ballots[ids[real]]
        if progress is not None:
            progress("neighbours", int(rows[-1]) + 1, total)
    return np.asarray(votes / votes.sum(1, keepdims=True))


def label_frequencies(given: Labels, classes: int) -> Floats:
    """[C] share of each label."""
    return np.bincount(given, minlength=classes) / max(len(given), 1)


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
