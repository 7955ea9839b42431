"""One question to an expert, and the opinion in its reply."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

from robustft import answers
from robustft.answers import Kind
from robustft.engines import Choice, Failure, Generation, Prompt
from robustft.opinions import Opinion


class Question(NamedTuple):
    """One thing to ask, read from a prefill or from generated text; equal ones are asked once."""

    prompt: Prompt
    candidates: tuple[str, ...] = ()  # allowed continuations
    read: bool = False  # candidates are chosen by likelihood; otherwise text is generated
    names: tuple[str, ...] = ()  # the answer each candidate stands for
    neutral: Prompt | None = None  # the content-free prompt to calibrate with
    max_tokens: int = 0
    kind: Kind | None = None  # how to parse generated text; None: the text itself is wanted
    options: tuple[str, ...] | None = None
    basis: str = ""  # a digest of the prompt, where the record alone does not settle it


def read_choices(
    questions: Sequence[Question],
    choices: Sequence[Choice | Failure],
    priors: Sequence[np.ndarray | Failure | None],
) -> list[Opinion]:
    """An opinion a question, from its candidates' likelihoods less those of its prior, if any."""
    said: dict[int, Opinion] = {}
    alike: dict[int, list[int]] = {}  # number of candidates -> rows, to be read as one matrix
    for row, (choice, prior) in enumerate(zip(choices, priors, strict=True)):
        if isinstance(choice, Failure):
            said[row] = Opinion(None, failure=choice.reason)
        elif isinstance(prior, Failure):
            said[row] = Opinion(None, failure=prior.reason)
        else:
            alike.setdefault(len(choice.logprobs), []).append(row)
    for width, rows in alike.items():
        got = [cast(Choice, choices[row]) for row in rows]
        logprobs = np.array([one.logprobs for one in got], np.float64)
        nothing = np.zeros(width)
        weights = logprobs - [nothing if priors[row] is None else priors[row] for row in rows]
        weights = np.exp(weights - weights.max(axis=1, keepdims=True))
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        best = probabilities.argmax(axis=1)
        nll = -logprobs[np.arange(len(rows)), best]
        for row, choice, place, value, shares in zip(
            rows, got, best.tolist(), nll.tolist(), probabilities.tolist(), strict=True
        ):
            said[row] = Opinion(
                answer=questions[row].names[place] or None,
                nll=value,
                entropy=choice.entropy,
                probabilities=tuple([round(share, 6) for share in shares]),
                prompt_tokens=choice.prompt_tokens,
                new_tokens=1,
            )
    return [said[row] for row in range(len(questions))]


def read_text(question: Question, reply: Generation | Failure) -> Opinion:
    """The opinion in generated text: the one of a few words it says, or what it answers."""
    if isinstance(reply, Failure):
        return Opinion(None, failure=reply.reason)
    silent = Opinion(
        answer=None,
        text=reply.text,
        prompt_tokens=reply.prompt_tokens,
        new_tokens=len(reply.nll),
    )
    if question.candidates:
        return _read_word(question, reply, silent)
    if question.kind is None:
        return silent
    parsed = answers.parse(
        reply.text, kind=question.kind, options=question.options, begun=question.prompt.prefix,
        finished=reply.finished,
    )  # fmt: skip
    if parsed.answer is None:
        return silent._replace(cut_off=question.kind == "text" and not reply.finished)
    return silent._replace(
        answer=parsed.answer,
        nll=reply.span_mean(reply.nll, parsed.start, parsed.stop),
        entropy=reply.span_mean(reply.entropy, parsed.start, parsed.stop),
    )


def _read_word(question: Question, reply: Generation, silent: Opinion) -> Opinion:
    """The candidate that a reply begins with, after "Answer:" where it repeats that."""
    words = "|".join(re.escape(word.strip()) for word in question.candidates)
    found = re.match(rf"[\W_]*(?:answer\b[\W_]*)?({words})\b", reply.text, re.IGNORECASE)
    if found is None:
        return silent
    said = [word.strip().casefold() for word in question.candidates].index(found[1].casefold())
    return silent._replace(
        answer=question.names[said] or None,
        nll=reply.span_mean(reply.nll, *found.span(1)),
        entropy=reply.span_mean(reply.entropy, *found.span(1)),
        probabilities=tuple(float(index == said) for index in range(len(question.names))),
    )
