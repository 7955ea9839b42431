"""The new label of a noisy record (eq. 5, 6), and which expert it came from."""

from __future__ import annotations

from dataclasses import dataclass

from robustft.store import Opinion


@dataclass(frozen=True, slots=True)
class NewLabel:
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
    context-enhanced answer (eq. 7), or of the answer that stands in for it in an ablation.
    """
    ranked = (
        ("reviewer", review),
        ("context", context),
        ("reasoned", reasoned),
        ("base", base),
    )
    source, chosen = next((name, said) for name, said in ranked if said is not None)
    failure = next((said.failure for _, said in ranked if said is not None and said.failure), "")
    if failure:
        return NewLabel(None, float("nan"), f"not answered again: {failure}")
    if chosen.answer is None:  # the reviewer settled on an expert that gave no answer
        given = [(name, said) for name, said in ranked if said is not None and said.answer]
        if not given:
            return NewLabel(None, float("nan"), "no expert gave an answer")
        source, chosen = given[0]
    measured = context or reasoned or base
    return NewLabel(chosen.answer, measured.nll, f"label from {source}")
