"""What detection has concluded: the split of the corpus, and why each record is where it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from robustft.crowd import Estimate
from robustft.detection.rule import Asked, Detection, paper_rule, unjudged
from robustft.opinions import Opinion
from robustft.prompts import LETTERS
from robustft.records import Record

PANEL = ("base", "reasoned")  # experts that do not see the given answer


@dataclass(frozen=True)
class Conclusion:
    """The split of a whole corpus, by position in the input (arrays may be mapped files)."""

    noisy: NDArray[np.bool_]  # [N]
    unjudged: NDArray[np.bool_]  # [N] an expert could not be reached
    pooled: NDArray[np.float64]  # [N, options] the crowd's probabilities; no column: no crowd
    wrong: NDArray[np.float64]  # [N] that the given answer is wrong; NaN where no crowd could tell
    jury: NDArray[np.int8]  # [N] which of `votes` counts for the record; -1: no crowd
    votes: Sequence[Mapping[str, float]] = ()  # of each jury: expert -> share of the vote
    powerless: bool = False  # no expert was better than chance, on any record
    noise_rate: Estimate | None = None  # share of wrong answers
    expected_precision: float = math.nan  # share of the noisy verdicts that are right
    # learner that votes -> [N, options] its probabilities; zeros where it was not asked
    learned: Mapping[str, NDArray[np.float16]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    stage_seconds: Mapping[str, float] = field(default_factory=dict)  # what the split took

    @functools.cached_property
    def silent(self) -> NDArray[np.bool_]:
        """[N] records without a verdict."""
        return self.unjudged | ((self.jury >= 0) & np.isnan(self.wrong))

    @functools.cached_property
    def clean(self) -> NDArray[np.bool_]:
        """[N] whom retrieval may show."""
        return ~(self.noisy | self.silent)

    @property
    def weights(self) -> dict[str, float]:
        """Expert -> share of the vote, over all records that a crowd judged."""
        counts = np.bincount(self.jury[self.jury >= 0], minlength=len(self.votes))
        found: dict[str, float] = {}
        for votes, count in zip(self.votes, counts.tolist(), strict=True):
            for name, share in votes.items():
                found[name] = found.get(name, 0.0) + share * count / max(int(counts.sum()), 1)
        return found

    def learners_said(self, start: int, count: int) -> Iterator[tuple[int, str, Opinion]]:
        """Row, learner and opinion of `count` records that follow one another from `start`."""
        for name, values in self.learned.items():
            block = values[start : start + count].astype(np.float64)
            best, logs = block.argmax(1), np.log(np.maximum(block, 1e-12))
            entropy = -(block * logs).sum(1)
            rounded = block.round(4).tolist()
            for row in np.flatnonzero(block.any(1)).tolist():
                option = int(best[row])
                nll = -float(logs[row, option])
                yield (
                    row, name,
                    Opinion(LETTERS[option], "", nll, float(entropy[row]), tuple(rounded[row])),
                )  # fmt: skip

    def detections(self, asked: Sequence[Asked]) -> list[Detection]:
        """The verdict on each of some records that follow one another in the input."""
        if not asked:
            return []
        first = asked[0].record.index
        return [
            unjudged(one) or self._by_crowd(one, first + row) or self._by_paper(one, first + row)
            for row, one in enumerate(asked)
        ]

    def _by_crowd(self, asked: Asked, position: int) -> Detection | None:
        """The crowd's verdict; None where there is no crowd."""
        jury = int(self.jury[position])
        if jury < 0:
            return None
        voters = ", ".join(f"{name} {w:.2f}" for name, w in self.votes[jury].items() if w)
        if not voters:
            return Detection(False, math.nan, "no expert is better than chance on these records")
        wrong = float(self.wrong[position])
        if math.isnan(wrong):
            return Detection(False, math.nan, "not judged: the model gave no answer")
        said = f"given answer wrong with probability {wrong:.2f}"
        if asked.record.options is not None and self.pooled.shape[1]:
            row = self.pooled[position]
            best = int(row.argmax())
            said = f"{LETTERS[best]} ({row[best]:.2f}), {said}"
        return Detection(bool(self.noisy[position]), wrong, f"crowd: {said}; votes {voters}")

    def _by_paper(self, asked: Asked, position: int) -> Detection:
        """The paper's verdict; the split is the one that relabeling went by."""
        return paper_rule(asked)._replace(noisy=bool(self.noisy[position]))

    def own_label(self, record: Record) -> tuple[str, float] | None:
        """The crowd's label and its negative log-probability where it outranks the panel's.

        Where learners on the corpus, or other models, hold most of the vote, the panel's model
        knows less about these labels than they do, and so would its context-enhanced answer and
        its review.
        """
        if record.options is None or not self._outranks_the_panel[self.jury[record.index]]:
            return None
        row = self.pooled[record.index]
        best = int(row.argmax())
        return LETTERS[best], -math.log(max(float(row[best]), 1e-12))

    def own_labels(self) -> NDArray[np.int64]:
        """[N] option of every `own_label`; -1 where there is none."""
        if not self._outranks_the_panel.any():
            return np.full(len(self.pooled), -1)
        own = self._outranks_the_panel[self.jury] & self.pooled.any(1)
        return np.where(own, self.pooled.argmax(1), -1)

    @functools.cached_property
    def _outranks_the_panel(self) -> NDArray[np.bool_]:
        """[juries + 1] whether others hold most of the vote; the last, of no jury: no."""
        shares = [sum(w for n, w in votes.items() if n not in PANEL) for votes in self.votes]
        learnt = self.pooled.shape[1] > 0
        return np.array([*(learnt and share > 0.5 for share in shares), False])
