"""Split the corpus into clean and noisy (eq. 3).

A detector sees the opinions on every record once (`observe`), then concludes. `PaperDetector` is
the paper's rule; `CrowdDetector` learns how far each expert can be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from robustft import answers, crowd
from robustft.experts import record_kind
from robustft.prompts import LETTERS
from robustft.records import Record
from robustft.retrieval import CosineKNN
from robustft.store import Opinion

NO_BETTER_THAN_CHANCE = (
    "these experts agree with the given answers no more than chance would: nothing was changed; "
    "use a stronger model (--model), or --detector paper to go on regardless"
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A record and the opinions that detection rests on."""

    record: Record
    base: Opinion
    reasoned: Opinion | None
    checker: Opinion | None


@dataclass(frozen=True, slots=True)
class Detection:
    """The verdict on one given answer; `noise_score` in [0, 1], higher is noisier."""

    noisy: bool
    noise_score: float
    reason: str


class Detector(Protocol):
    """Observes every record in input order, concludes once, then answers by position."""

    def observe(self, asked: Sequence[Asked]) -> None:
        """Take in the opinions on the next records."""
        ...

    def conclude(self, embeddings: NDArray[np.float32]) -> list[str]:
        """Decide on all records, [N, d] embeddings in input order; returns warnings."""
        ...

    def detection(self, asked: Asked) -> Detection:
        """The verdict on one record, after `conclude`."""
        ...

    def own_label(self, record: Record) -> tuple[str, float] | None:
        """The detector's label and its negative log-probability where it outranks the panel's."""
        ...


class PaperDetector:
    """The paper's rule to the letter; see `paper_rule`."""

    def observe(self, asked: Sequence[Asked]) -> None:
        """Nothing to learn."""

    def conclude(self, embeddings: NDArray[np.float32]) -> list[str]:
        """Nothing to decide: the rule looks at one record at a time."""
        return []

    def detection(self, asked: Asked) -> Detection:
        """`paper_rule` on this record."""
        return paper_rule(asked)

    def own_label(self, record: Record) -> tuple[str, float] | None:
        """None: the reviewer decides (eq. 6)."""
        return None


class CrowdDetector:
    """Pooled experts, each weighted by what it knows of the given answers (`robustft.crowd`).

    Where every multiple-choice record offers the same options, a regression and a neighbour vote
    on embeddings join the panel; elsewhere letters mean something else in every question and
    nothing learns from them. The checker has no vote: it sees the given answer, so agreeing with
    it proves nothing. Records without options follow `paper_rule`.
    """

    def __init__(self, total: int) -> None:
        self._given = np.full(total, -1, dtype=np.int64)  # -1: no options
        self._options: set[tuple[str, ...]] = set()
        self._panel: dict[str, list[NDArray[np.float32]]] = {"base": [], "reasoned": []}
        self._pooled: NDArray[np.float64] | None = None
        self._weights: dict[str, float] = {}
        self.powerless = False

    def observe(self, asked: Sequence[Asked]) -> None:
        """Note the given letter and the panel's option probabilities of each record."""
        width = max((len(a.record.options or ()) for a in asked), default=0)
        rows = {
            name: np.zeros((len(asked), width), dtype=np.float32)
            for name in self._panel
            if asked and getattr(asked[0], name) is not None
        }
        for position, one in enumerate(asked):
            options = one.record.options
            if options is None:
                continue
            self._given[one.record.index] = LETTERS.index(one.record.answer)
            if len(self._options) < 2:
                self._options.add(tuple(answers.normalise(text, "span") for text in options))
            for name, values in rows.items():
                said: Opinion = getattr(one, name)
                values[position, : len(options)] = option_probabilities(said, len(options))
        for name, values in rows.items():
            self._panel[name].append(values)

    def conclude(self, embeddings: NDArray[np.float32]) -> list[str]:
        """Pool the experts over all records with options."""
        chosen = np.flatnonzero(self._given >= 0)
        if len(chosen) == 0:
            return []
        given = self._given[chosen]
        width = max(part.shape[1] for part in self._panel["base"])
        experts = {}
        for name, parts in self._panel.items():
            if parts:
                padded = [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts]
                experts[name] = np.concatenate(padded)[chosen].astype(np.float64)
        self._panel = {}
        if len(self._options) == 1 and len(chosen) > 1:
            rows = embeddings if len(chosen) == len(embeddings) else embeddings[chosen]
            experts["regression"] = crowd.regression_expert(rows, given, width)
            experts["neighbours"] = crowd.neighbour_expert(CosineKNN(rows), given, width)
        found = crowd.pool(experts, given, width)
        self._weights = dict(found.weights)
        self.powerless = not any(found.weights.values())
        self._pooled = np.zeros((len(self._given), width))
        self._pooled[chosen] = found.probabilities
        return [NO_BETTER_THAN_CHANCE] if self.powerless else []

    @property
    def weights(self) -> dict[str, float]:
        """Expert -> share of the vote, after `conclude`; empty without options."""
        return self._weights

    def detection(self, asked: Asked) -> Detection:
        """Noisy where the crowd's answer is another one."""
        given = int(self._given[asked.record.index])
        if given < 0 or self._pooled is None:
            return paper_rule(asked)
        if self.powerless:
            return Detection(False, 0.5, "no expert is better than chance on this corpus")
        row = self._pooled[asked.record.index]
        best = int(row.argmax())
        noisy = bool(row[given] < row[best])
        voters = ", ".join(f"{name} {w:.2f}" for name, w in self._weights.items() if w)
        said = f"crowd: {LETTERS[best]} ({row[best]:.2f}), given {row[given]:.2f}; votes {voters}"
        return Detection(noisy, float(min(max(1.0 - row[given], 0.0), 1.0)), said)

    def own_label(self, record: Record) -> tuple[str, float] | None:
        """The crowd's label where learners on the corpus hold most of the vote.

        There the panel's model knows less about these labels than the corpus itself does, and so
        would its context-enhanced answer and its review.
        """
        learnt = sum(self._weights.get(name, 0.0) for name in ("regression", "neighbours"))
        if self._pooled is None or self._given[record.index] < 0 or learnt <= 0.5:
            return None
        row = self._pooled[record.index]
        best = int(row.argmax())
        return LETTERS[best], -math.log(max(float(row[best]), 1e-12))


def option_probabilities(said: Opinion, options: int) -> NDArray[np.float32]:
    """[options] an expert's probabilities; all on its letter where only that is known."""
    if said.probabilities is not None:
        return np.array(said.probabilities, dtype=np.float32)
    values = np.full(options, 1.0 / options, dtype=np.float32)
    if said.answer is not None and said.answer in LETTERS[:options]:
        values[:] = 0.0
        values[LETTERS.index(said.answer)] = 1.0
    return values


def paper_rule(asked: Asked) -> Detection:
    """The paper's rule.

    With a checker, its word decides: noisy where it answers no (eq. 3). Without one, the given
    answer is clean where every prediction agrees with it. Without the reasoning expert only the
    base prediction is compared. The noise score is the mean, over the experts asked, of the
    probability each gives to the answer being wrong.
    """
    record, checker = asked.record, asked.checker
    predictions = {"base": asked.base, "reasoned": asked.reasoned}
    experts = {name: said for name, said in predictions.items() if said is not None}
    doubts = [doubt(record, said) for said in experts.values()]
    agreeing = [name for name, said in experts.items() if agrees(record, said)]
    if checker is not None and checker.answer is not None:
        probabilities = checker.probabilities or (0.5, 0.5)
        doubts.append(probabilities[1])
        noisy = checker.answer == "no"
        said = f"checker: {'no' if noisy else 'yes'} (p(no) {probabilities[1]:.2f})"
    else:
        noisy = len(agreeing) < len(experts)
        said = "no checker: all predictions must agree"
    sides = [f"{name} {'agrees' if name in agreeing else 'disagrees'}" for name in experts]
    return Detection(noisy, sum(doubts) / len(doubts), "; ".join([said, *sides]))


def unjudged(asked: Asked) -> Detection | None:
    """The verdict where an expert could not be reached: kept as given, with the reason."""
    experts = {"base": asked.base, "reasoned": asked.reasoned, "checker": asked.checker}
    for name, said in experts.items():
        if said is not None and said.failure:
            return Detection(False, 0.5, f"not judged: {name}: {said.failure}")
    return None


def agrees(record: Record, opinion: Opinion) -> bool:
    """Whether an expert's answer is the given one."""
    if opinion.answer is None:
        return False
    kind = record_kind(record)
    return answers.matches(record.answer, opinion.answer, kind=kind, options=record.options)


def doubt(record: Record, opinion: Opinion) -> float:
    """The probability an expert gives to the given answer being wrong, in [0, 1].

    From the option probabilities where there are any; else one minus the agreement of the texts;
    0.5 where the expert gave no answer.
    """
    if opinion.answer is None:
        return 0.5
    if record.options is not None and opinion.probabilities is not None:
        return 1.0 - opinion.probabilities[LETTERS.index(record.answer)]
    kind = record_kind(record)
    agreement = answers.agreement(record.answer, opinion.answer, kind=kind, options=record.options)
    return min(max(1.0 - agreement, 0.0), 1.0)
