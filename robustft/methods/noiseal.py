"""NoiseAL ("Hide and Seek in Noise Labels", Yuan et al., arXiv 2504.02901) carried over to SFT.

Two small scorers, a strong and a weak one, are warmed up on the noisy labels. A dynamic threshold,
the running mean of their confidence, splits the data into reliable R, purifiable P and hard H. The
LLM labels P again with its nearest R examples as demonstrations. Both scorers learn from R by
cross-entropy, from P by reversed cross-entropy, from H by mixup of embeddings; then the data are
split anew. SFT is on R as given and on P with the LLM's labels; H, whose labels nobody trusts, is
left out.

Where the paper's text, as far as it was at hand, is silent, this was chosen: the strong scorer is
a linear head on sentence embeddings, the weak one a linear head on hashed character n-grams (there
BERT and a BiLSTM). R: both scorers predict the given answer, with a mean confidence at or above the
threshold. P: not R, and at least one scorer is that confident. H: the rest. The threshold starts at
chance and moves by a tenth of the way after every epoch; 5 warm-up epochs, then 3 rounds of 2
epochs; 3 demonstrations. An open question's candidates are its given answer and three answers to
other questions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustft.answers import normalise
from robustft.cleaning import open_source
from robustft.methods.base import Method, Setting
from robustft.methods.decisions import Decision, write_decisions
from robustft.methods.scorers import Scorer, ngram_features, sharpened
from robustft.predictions import predict
from robustft.progress import Progress
from robustft.prompts import LETTERS, context_prompt
from robustft.records import Record
from robustft.retrieval import CosineKNN
from robustft.verdicts import CleanResult

_WARM_UP, _ROUNDS, _EPOCHS = 5, 3, 2
_MOMENTUM = 0.9
_OTHERS = 3
Rows = NDArray[np.int64]


@dataclass(slots=True)
class _Split:
    reliable: NDArray[np.bool_]  # [N]
    purified: NDArray[np.bool_]
    hard: NDArray[np.bool_]


class _NoiseAL:
    def __init__(self, setting: Setting, records: Sequence[Record]) -> None:
        self._setting = setting
        self._records = records
        self._answers = _candidates(records)
        self._given = np.array([_index(r, a) for r, a in zip(records, self._answers, strict=True)])
        self._width = max(map(len, self._answers))
        questions = [record.question for record in records]
        self._embeddings = setting.embedder.encode(questions)
        layouts = {tuple(normalise(a, "span") for a in answers) for answers in self._answers}
        self._shared = len(layouts) == 1
        self._texts = questions if self._shared else self._pairs()  # what the features are of
        strong = self._embeddings if self._shared else setting.embedder.encode(self._texts)
        seed = setting.config.seed
        self._scorers = (
            Scorer(strong, self._width, self._shared, seed),
            Scorer(ngram_features(self._texts), self._width, self._shared, seed + 1),
        )
        self._threshold = 1.0 / self._width
        self._round = 0  # of asking the LLM
        self._failures: dict[int, str] = {}  # row -> why the LLM gave no reply, asked last

    def run(self) -> list[Decision]:
        """The decision on every record."""
        total, labels = len(self._records), self._given.copy()
        everything, nothing = np.arange(total), np.zeros(0, np.int64)
        none = np.zeros((0, self._width))
        for _ in range(_WARM_UP):
            self._epoch((everything, self._given), (nothing, nothing), (nothing, none))
        for _ in range(_ROUNDS):
            split = self._split()
            labels = self._purify(split)
            self._follow()
            known = np.flatnonzero(split.purified & (labels >= 0))
            reliable, hard = np.flatnonzero(split.reliable), np.flatnonzero(split.hard)
            soft = sharpened(self._mean()[hard])
            for _ in range(_EPOCHS):
                self._epoch((reliable, self._given[reliable]), (known, labels[known]), (hard, soft))
        split = self._split()
        labels = self._purify(split)
        return [self._decision(row, split, int(labels[row])) for row in range(total)]

    def _pairs(self) -> list[str]:
        """Each question with each of its candidates, `width` a record."""
        return [
            f"{record.question}\n{answers[i] if i < len(answers) else ''}"
            for record, answers in zip(self._records, self._answers, strict=True)
            for i in range(self._width)
        ]

    def _follow(self) -> None:
        """Give the scorers the features of new candidates, which the LLM has named."""
        if self._shared:  # nobody's candidates change
            return
        before, self._texts = self._texts, self._pairs()
        pairs = zip(before, self._texts, strict=True)
        new = [place for place, (was, text) in enumerate(pairs) if text != was]
        if new:
            strong, weak = self._scorers
            fresh = self._setting.embedder.encode([self._texts[place] for place in new])
            strong.features[new] = fresh
            weak.features = ngram_features(self._texts)

    def _epoch(self, reliable: tuple[Rows, Rows], purified: tuple[Rows, Rows],
               hard: tuple[Rows, NDArray[np.float64]]) -> None:  # fmt: skip
        for scorer in self._scorers:
            scorer.epoch(reliable, purified, hard)
        confidence = float(self._mean().max(1).mean())
        self._threshold = _MOMENTUM * self._threshold + (1 - _MOMENTUM) * confidence

    def _mean(self) -> NDArray[np.float64]:
        first, second = (scorer.probabilities(len(self._records)) for scorer in self._scorers)
        return (first + second) / 2

    def _split(self) -> _Split:
        said = [scorer.probabilities(len(self._records)) for scorer in self._scorers]
        sure = [values.max(1) for values in said]
        agree = np.logical_and.reduce([values.argmax(1) == self._given for values in said])
        reliable = agree & ((sure[0] + sure[1]) / 2 >= self._threshold)
        purified = ~reliable & (np.maximum(*sure) >= self._threshold)
        return _Split(reliable, purified, ~reliable & ~purified)

    def _purify(self, split: _Split) -> Rows:
        """[N] the LLM's labels of P, -1 where it gave none; elsewhere the given ones."""
        labels = self._given.copy()
        rows = np.flatnonzero(split.purified)
        self._failures.clear()
        self._round += 1
        if len(rows) == 0:
            return labels
        shown: list[list[int]] = [[] for _ in rows]
        if split.reliable.any():
            index = CosineKNN(self._embeddings, threads=self._setting.config.threads)
            queries = np.ascontiguousarray(self._embeddings[rows])
            k = min(self._setting.config.k, len(self._records))
            ids, _ = index.search(queries, k, allowed=split.reliable)
            shown = [[i for i in near if i >= 0] for near in ids.tolist()]
        records = [self._records[int(row)] for row in rows]
        prompts = [
            context_prompt(record, [self._example(i) for i in near])
            for record, near in zip(records, shown, strict=True)
        ]
        limit = self._setting.config.experts.answer_tokens
        doing = f"noiseal · labels, {self._round} of {_ROUNDS + 1}"
        with Progress(doing, len(rows), unit="records") as progress:
            said = predict(records, prompts, self._setting.engine, limit, progress=progress.update)
        for row, one in zip(rows, said, strict=True):
            labels[row] = self._learn(int(row), one.answer)
            if one.failure:
                self._failures[int(row)] = one.failure
        return labels

    def _learn(self, row: int, answer: str | None) -> int:
        """The candidate an answer is; a new one takes the place of the last but the given one."""
        if answer is None:
            return -1
        record, candidates = self._records[row], self._answers[row]
        if record.options is not None:
            return LETTERS.index(answer)
        kind = record.kind
        normal = [normalise(one, kind) for one in candidates]
        if normalise(answer, kind) not in normal:
            candidates[max(len(candidates) - 1, 1) :] = [answer]
            return len(candidates) - 1
        return normal.index(normalise(answer, kind))

    def _example(self, row: int) -> tuple[str, Sequence[str] | None, str]:
        record = self._records[row]
        return record.question, record.options, record.answer

    def _decision(self, row: int, split: _Split, label: int) -> Decision:
        record = self._records[row]
        if split.reliable[row]:
            return Decision(record.answer, "reliable")
        if row in self._failures:
            return Decision.unanswered(record, self._failures[row])
        if split.hard[row] or label < 0:
            return Decision(None, "hard" if split.hard[row] else "purifiable, but no label")
        answer = LETTERS[label] if record.options is not None else self._answers[row][label]
        return Decision(answer, "purified by the model")


def _candidates(records: Sequence[Record]) -> list[list[str]]:
    """The answers among which the scorers choose: options, or the given answer and some others."""
    pools: dict[str, list[str]] = {}
    for record in records:
        if record.options is None:
            pools.setdefault(record.kind, []).append(record.answer)
    found = []
    for record in records:
        if record.options is not None:
            found.append(list(record.options))
            continue
        kind = record.kind
        pool = pools[kind]
        start = int.from_bytes(hashlib.blake2b(record.key, digest_size=4).digest(), "big")
        others: dict[str, str] = {}
        for step in range(min(len(pool), 64)):
            answer = pool[(start + step) % len(pool)]
            if normalise(answer, kind) != normalise(record.answer, kind):
                others.setdefault(normalise(answer, kind), answer)
            if len(others) == _OTHERS:
                break
        found.append([record.answer, *others.values()])
    return found


def _index(record: Record, candidates: Sequence[str]) -> int:
    return LETTERS.index(record.answer) if record.options is not None else 0


def prepare(setting: Setting) -> CleanResult:
    """Write R as given and P with the LLM's labels. The whole corpus is held in memory."""
    config = setting.config
    decisions: list[Decision] = []

    def decide(chunk: Sequence[Record], _: Callable[[float], None]) -> list[Decision]:
        if not decisions:
            records = [item for item in open_source(config) if isinstance(item, Record)]
            decisions.extend(_NoiseAL(setting, records).run())
        return [decisions[record.index] for record in chunk]

    return write_decisions(config, "noiseal", decide, quiet=True)


METHOD = Method("noiseal", "NoiseAL", "co-predicting small models, the LLM as annotator", prepare)
