"""The paper's rule on one record, and what it shares with the crowd: opinions in, a verdict out."""

from __future__ import annotations

import math
from typing import NamedTuple

from robustft import answers
from robustft.opinions import Opinion
from robustft.prompts import LETTERS
from robustft.records import Record


class Asked(NamedTuple):
    """A record and the opinions that detection rests on."""

    record: Record
    base: Opinion
    reasoned: Opinion | None
    checker: Opinion | None
    others: tuple[Opinion, ...] = ()  # what other models said, of which the crowd alone hears


class Detection(NamedTuple):
    """The verdict on one given answer."""

    noisy: bool
    noise_score: float  # in [0, 1], higher is noisier; NaN: not judged
    reason: str


def paper_rule(asked: Asked) -> Detection:
    """The paper's rule.

    With a checker, its word decides: noisy where it answers no (eq. 3). Without one, the given
    answer is clean where every prediction agrees with it. Without the reasoning expert only the
    base prediction is compared. The noise score is the mean, over the experts asked, of the
    probability each gives to the answer being wrong.
    """
    record, checker = asked.record, asked.checker
    doubts, sides = [], []
    unanimous = True
    for name, prediction in (("base", asked.base), ("reasoned", asked.reasoned)):
        if prediction is not None:
            agreeing = agrees(record, prediction)
            unanimous = unanimous and agreeing
            doubts.append(doubt(record, prediction))
            sides.append(f"{name} {'agrees' if agreeing else 'disagrees'}")
    if checker is not None and checker.answer is not None:
        probabilities = checker.probabilities or (0.5, 0.5)
        doubts.append(probabilities[1])
        noisy = checker.answer == "no"
        said = f"checker: {'no' if noisy else 'yes'} (p(no) {probabilities[1]:.2f})"
    else:
        noisy = not unanimous
        said = "no checker: all predictions must agree"
    return Detection(noisy, sum(doubts) / len(doubts), "; ".join([said, *sides]))


def unjudged(asked: Asked) -> Detection | None:
    """The verdict where an expert could not be reached: kept as given, with the reason."""
    for name in ("base", "reasoned", "checker"):
        said: Opinion | None = getattr(asked, name)
        if said is not None and said.failure:
            return Detection(False, math.nan, f"not judged: {name}: {said.failure}")
    return None


def agrees(record: Record, opinion: Opinion) -> bool:
    """Whether an expert's answer is the given one."""
    if opinion.answer is None:
        return False
    options = record.options
    if options is not None and opinion.answer in LETTERS[: len(options)]:
        return options[LETTERS.index(opinion.answer)] == record.given_option
    return answers.matches(record.answer, opinion.answer, kind=record.kind, options=options)


def doubt(record: Record, opinion: Opinion) -> float:
    """The probability an expert gives to the given answer being wrong, in [0, 1].

    From the option probabilities where there are any; else one minus the agreement of the texts;
    0.5 where the expert gave no answer.
    """
    if opinion.answer is None:
        return 0.5
    if record.options is not None and opinion.probabilities is not None:
        given = record.given_option
        pairs = zip(record.options, opinion.probabilities, strict=True)
        return max(1.0 - sum(share for option, share in pairs if option == given), 0.0)
    agreement = answers.agreement(
        record.answer, opinion.answer, kind=record.kind, options=record.options
    )
    return min(max(1.0 - agreement, 0.0), 1.0)
