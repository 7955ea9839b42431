"""Nearest questions by their embeddings: which of them are copies, and how the others vote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from robustft.crowd.judgement import Floats
from robustft.retrieval import CosineKNN

VOTERS = 131_072  # of a larger corpus so many questions, drawn at random, are neighbours
_VOTES = 20  # neighbours that each record asks
_CHUNK = 16_384  # records that ask at a time
_COPY = 0.98  # cosine of questions that differ in a comma or a word
# Of such questions the share that bears the label of the nearest other one, beyond the share that
# would by chance, from which on labels are taken to be copied with the texts. Where 3 % of labels
# are wrong by themselves it is 0.9; of a label that nearly all bear, agreement tells nothing.
_COPIED = 0.95
_FEW_COPIES = 20  # of fewer the labels may agree by chance
_ASKED = 4096  # questions whose nearest other one tells whether there are such copies

Labels = NDArray[np.int64]
Features = Any  # [N, d]: dense, scipy CSR, `Beside`, or what gathers such rows by their numbers
Progress: TypeAlias = Callable[[str, int, int], object]  # what is done, how much of it, of how much


def distinct(questions: Labels | None, total: int) -> tuple[Labels, Labels]:
    """([N] number of each record's question, by first appearance; [G] the record it appears in)."""
    if questions is None:
        return np.arange(total), np.arange(total)
    _, first, group = np.unique(questions, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return number[group], first[order]


def drawn(questions: Labels | None, total: int, seed: int = 0) -> Labels | None:
    """The records of `VOTERS` questions, drawn at random; None where there are no more."""
    group, first = distinct(questions, total)
    if len(first) <= VOTERS:
        return None
    chosen = np.zeros(len(first), np.bool_)
    chosen[np.random.default_rng(seed).choice(len(first), VOTERS, replace=False)] = True
    return np.flatnonzero(chosen[group])


def near_copies(
    embeddings: Features,
    given: Labels,
    questions: Labels | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Labels | None:
    """[N] numbers as `questions`, equal also where nearly the same is asked.

    Only where such questions bear the same label more often than if each had been labelled by
    itself: then an error was copied with the text, and every copy would confirm it. Labels given
    one by one are left to teach each other. Every question is compared with every other one.
    """
    group, first = distinct(questions, len(given))
    if len(first) < 2:
        return questions
    rows = embeddings[first]
    if not _copied(rows, given[first], threads):
        return questions
    leader = np.arange(len(first))
    leaders = leader
    turn, more = 0, True
    while more and len(leaders) > 1:
        turn += 1
        index = CosineKNN(rows[leaders], threads=threads)
        found = index.self_search(
            min(_VOTES, len(leaders) - 1),
            threshold=_COPY,
            progress=_told(progress, f"near copies, pass {turn}", len(leaders)),
        )
        ids = found[0]
        joined = np.arange(len(leaders))
        for row in np.flatnonzero(ids[:, 0] >= 0).tolist():
            heads = np.unique(joined[ids[row][(ids[row] >= 0) & (ids[row] < row)]])
            cosines = rows[leaders[heads]] @ rows[leaders[row]]
            if (cosines > _COPY).any():
                joined[row] = heads[cosines.argmax()]
        own = np.flatnonzero(joined == np.arange(len(leaders)))
        # Of many copies not all are among the nearest of one.
        more = len(own) < len(leaders) and bool((ids[own, -1] >= 0).any())
        place = np.empty(len(first), np.int64)
        place[leaders] = leaders[joined]
        leader = place[leader]
        leaders = leaders[own]
    return leader[group]


def _told(
    progress: Progress | None, stage: str, records: int
) -> Callable[[int, int], object] | None:
    """What a search tells of its pairs, as records of `stage`."""
    if progress is None:
        return None
    return lambda done, total: progress(stage, records * done // max(total, 1), records)


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


def neighbour_vote(
    features: Features,
    given: Labels,
    classes: int,
    *,
    questions: Labels | None = None,
    voters: Labels | None = None,
    joining: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Floats, Labels]:
    """[N, C] cosine-weighted votes of the questions nearest to each row's, smoothed by one vote.

    A question has one vote, however many records ask it: their labels share it.

    voters: the records whose questions have one; all when None.
    joining: whether another record asks the question nearest to its own where that is nearly the
        same, and so does not hear it.
    With it [N] which of the voters' questions each record asks, -1 for none.
    """
    total = len(given)
    voters = np.arange(total) if voters is None else voters
    group, first = distinct(None if questions is None else questions[voters], len(voters))
    asks = np.full(total, -1)
    asks[voters] = group
    ballots = np.zeros((len(first), classes))
    np.add.at(ballots, (group, given[voters]), 1.0)
    ballots /= ballots.sum(1, keepdims=True)
    index = CosineKNN(features[voters[first]], threads=threads)
    votes = np.tile(label_frequencies(given, classes), (total, 1))
    heard = min(_VOTES, max(len(first) - 1, 1))
    for low in range(0, total, _CHUNK):
        rows = np.arange(low, min(low + _CHUNK, total))
        near, cosines = index.search(features[rows], heard + joining, exclude=asks[rows])
        if joining:
            copies = np.asarray((asks[rows] < 0) & (cosines[:, 0] > _COPY))
            asks[rows[copies]] = near[copies, 0]
            near[copies, :-1], cosines[copies, :-1] = near[copies, 1:], cosines[copies, 1:]
        for ids, cosine in zip(near.T[:heard], cosines.T[:heard], strict=True):
            real = ids >= 0
            trust = np.clip(cosine[real].astype(np.float64), 0, 1)
            votes[rows[real]] += trust[:, None] * ballots[ids[real]]
        if progress is not None:
            progress("neighbours", int(rows[-1]) + 1, total)
    votes /= votes.sum(1, keepdims=True)
    return votes, asks


def label_frequencies(given: Labels, classes: int) -> Floats:
    """[C] share of each label."""
    return np.bincount(given, minlength=classes) / max(len(given), 1)
