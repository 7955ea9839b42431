"""The new label of a noisy record (eq. 5, 6), and which expert it came from."""

from __future__ import annotations

from typing import NamedTuple

from robustft.opinions import Opinion


class NewLabel(NamedTuple):
    """`answer` is None where no expert gave one; `nll` is the confidence of eq. 7, in nats."""

    answer: str | None
    nll: float
    reason: str


def relabel(
    reasoned: Opinion | None, base: Opinion, context: Opinion | None, review: Opinion | None
) -> NewLabel:
    """Settle the label.

    The reviewer's answer where there is a reviewer (eq. 6), else the context-enhanced one (eq. 5),
    else the reasoned one, else the base model's. Confidence is the response entropy of the
    context-enhanced answer (eq. 7), or of the one that stands in for it where there is none.
    """
    ranked = [
        (name, said)
        for name, said in (
            ("reviewer", review),
            ("context", context),
            ("reasoned", reasoned),
            ("base", base),
        )
        if said is not None
    ]
    for _, said in ranked:
        if said.failure:
            return NewLabel(None, float("nan"), f"not answered again: {said.failure}")
    # A reviewer may settle on an expert that gave no answer.
    source, chosen = next((one for one in ranked if one[1].answer), (None, None))
    if chosen is None:
        return NewLabel(None, float("nan"), "no expert gave an answer")
    answered = (one for one in (context, reasoned, base) if one is not None and one.answer)
    measured = next(answered, chosen)
    return NewLabel(chosen.answer, measured.nll, f"label from {source}")
