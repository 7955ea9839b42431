"""Split the corpus into clean and noisy (eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

from robustft import answers
from robustft.experts import record_kind
from robustft.prompts import LETTERS
from robustft.records import Record
from robustft.store import Opinion


@dataclass(frozen=True, slots=True)
class Detection:
    """The verdict on one given answer; `noise_score` in [0, 1], higher is noisier."""

    noisy: bool
    noise_score: float
    reason: str


def detect_paper(
    record: Record, base: Opinion, reasoned: Opinion | None, checker: Opinion | None
) -> Detection:
    """The paper's rule to the letter.

    With a checker, its word decides: noisy where it answers no (eq. 3). Without one, the given
    answer is clean where every prediction agrees with it. Without the reasoning expert only the
    base prediction is compared. The noise score is the mean, over the experts asked, of the
    probability each gives to the answer being wrong.
    """
    predictions = {"base": base, "reasoned": reasoned}
    asked = {name: opinion for name, opinion in predictions.items() if opinion is not None}
    doubts = [doubt(record, opinion) for opinion in asked.values()]
    agreeing = [name for name, opinion in asked.items() if agrees(record, opinion)]
    if checker is not None:
        probabilities = checker.probabilities or (0.5, 0.5)
        doubts.append(probabilities[1])
        noisy = checker.answer == "no"
        said = f"checker: {'no' if noisy else 'yes'} (p(no) {probabilities[1]:.2f})"
    else:
        noisy = len(agreeing) < len(asked)
        said = "no checker: all predictions must agree"
    sides = [f"{name} {'agrees' if name in agreeing else 'disagrees'}" for name in asked]
    return Detection(noisy, sum(doubts) / len(doubts), "; ".join([said, *sides]))


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
