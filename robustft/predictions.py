"""What a model answers to records, and whether that is right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from robustft.answers import matches, parse
from robustft.engines import Engine, Failure, Prompt
from robustft.prompts import LETTERS, answer_prompt, letters, opening
from robustft.records import Record

_CATEGORY_FIELDS = ("Subject", "subject", "Category", "category")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model answered to one record."""

    record: Record
    answer: str | None  # None: no answer could be read
    correct: bool
    reply: str = ""  # generated text; empty for a choice read from likelihoods
    probability: float | None = None  # of the chosen option among the options
    category: str | None = None
    failure: str = ""  # why the engine gave no reply; such a record is not counted
    score: float | None = None  # of a metric with partial credit (DROP's F1); None: 0 or 1


Ask = Callable[[Sequence[Record]], Sequence[Prompt]]
Judge = Callable[[Record, str], tuple[str | None, bool, float]]


def ask_plainly(records: Sequence[Record]) -> list[Prompt]:
    """The base expert's prompt for each record (eq. 1)."""
    return [answer_prompt(record) for record in records]


def judge(record: Record, reply: str) -> tuple[str | None, bool, float]:
    """The answer in a generated reply, whether it is an accepted one, and its score.

    One that was cut off is judged as far as it goes.
    """
    kind = record.kind
    answer = parse(reply, kind=kind, options=record.options, begun=opening(kind)).answer
    right = matches(answer, accepted_answers(record), kind=kind, options=record.options)
    return answer, right, float(right)


def accepted_answers(record: Record) -> list[str]:
    """The file's answer, and what its field `answers` (a list, or one in JSON) accepts besides."""
    more = record.row.get("answers")
    if isinstance(more, str):
        with contextlib.suppress(ValueError):
            more = orjson.loads(more)
    listed = more if isinstance(more, list) else []
    return [record.answer, *(str(one) for one in listed if isinstance(one, str | int | float))]


def predict(
    records: Sequence[Record],
    prompts: Sequence[Prompt],
    engine: Engine,
    answer_tokens: int,
    judge: Judge = judge,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Prediction]:
    """The model's answers to `prompts`, one a record and in their order."""
    found: dict[int, Prediction] = {}
    read = engine.abilities.choose
    choices = [i for i, record in enumerate(records) if record.options and read]
    others = [i for i, record in enumerate(records) if not (record.options and read)]
    for group in (choices, others):
        room = answer_tokens if group is others else 0
        for batch in engine.plan([prompts[i] for i in group], room):
            rows = [group[i] for i in batch]
            asked = [records[row] for row in rows]
            put = [prompts[row] for row in rows]
            if group is choices:
                answered = _choose(asked, put, engine)
            else:
                answered = _generate(asked, put, engine, answer_tokens, judge)
            found.update(zip(rows, answered, strict=True))
            progress(len(rows))
    return [found[i] for i in range(len(records))]


def _choose(
    records: Sequence[Record], prompts: Sequence[Prompt], engine: Engine
) -> list[Prediction]:
    """The likeliest option; of equally likely ones the first. Options of one text are one."""
    options = [record.options or () for record in records]
    chosen = engine.choose(prompts, [letters(texts) for texts in options])
    predictions = []
    for record, texts, choice in zip(records, options, chosen, strict=True):
        if isinstance(choice, Failure):
            predictions.append(Prediction(record, None, False, failure=choice.reason))
            continue
        best = int(np.argmax(choice.logprobs))
        answer = LETTERS[best]
        predictions.append(
            Prediction(
                record,
                answer,
                texts[best] == record.given_option,
                probability=float(choice.probabilities[best]),
                category=category_of(record.row),
            )
        )
    return predictions


def _generate(
    records: Sequence[Record],
    prompts: Sequence[Prompt],
    engine: Engine,
    answer_tokens: int,
    judge: Judge,
) -> list[Prediction]:
    """The answer in a generated reply."""
    replies = engine.generate(prompts, answer_tokens)
    predictions = []
    for record, reply in zip(records, replies, strict=True):
        if isinstance(reply, Failure):
            predictions.append(Prediction(record, None, False, failure=reply.reason))
            continue
        answer, right, score = judge(record, reply.text)
        category = category_of(record.row)
        predictions.append(
            Prediction(record, answer, right, reply.text, category=category, score=score)
        )
    return predictions


def category_of(row: Mapping[str, Any]) -> str | None:
    """What a record is counted under: its field Subject or Category, where it has one."""
    for name in _CATEGORY_FIELDS:
        value = row.get(name)
        if isinstance(value, str) and 0 < len(value.strip()) <= 100:
            return value.strip()
    return None


def as_line(prediction: Prediction) -> bytes:
    """One line of the predictions file."""
    record = prediction.record
    fields: dict[str, Any] = {
        "id": record.id,
        "expected": record.answer,
        "predicted": prediction.answer,
        "correct": prediction.correct,
    }
    if prediction.probability is not None:
        fields["probability"] = round(prediction.probability, 6)
    if record.options is None:
        fields["reply"] = prediction.reply
    if prediction.failure:
        fields["failed"] = prediction.failure
    if prediction.category is not None:
        fields["category"] = prediction.category
    if prediction.score not in (None, float(prediction.correct)):
        fields["score"] = prediction.score
    return orjson.dumps(fields) + b"\n"


def from_line(record: Record, line: bytes) -> Prediction:
    """The inverse of `as_line`."""
    fields = orjson.loads(line)
    return Prediction(
        record,
        fields["predicted"],
        fields["correct"],
        fields.get("reply", ""),
        fields.get("probability"),
        fields.get("category"),
        fields.get("failed", ""),
        fields.get("score"),
    )
