"""What an expert said about a record, and many such opinions as bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import orjson


class Opinion(NamedTuple):
    """What one expert said about one record.

    `nll` is eq. 7 (nats per answer token), `entropy` the mean token entropy over the same tokens;
    both NaN where the expert gave no answer. `probabilities` stand for the options (choice), or
    for the allowed replies (checker: yes, no; reviewer of free text: first, second).
    """

    answer: str | None
    text: str = ""
    nll: float = math.nan
    entropy: float = math.nan
    probabilities: tuple[float, ...] | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    cut_off: bool = False  # a text that did not end within the tokens it had: no answer
    failure: str = ""  # why there was no reply; such an opinion is asked for again on resume


def first_failure(opinions: Iterable[Opinion]) -> str:
    """Why an opinion that rests on these cannot be had; empty where it can."""
    return next((said.failure for said in opinions if said.failure), "")


def opinion_of(said: Mapping[int, Opinion], row: int, failures: Mapping[int, str]) -> Opinion:
    """An expert's stored opinion on a row of a unit, or why there is none."""
    found = said.get(row)
    return Opinion(None, failure=failures.get(row, "was not asked")) if found is None else found


class Said(NamedTuple):
    """An opinion as it is stored.

    `basis` tells what was asked where the record alone does not: a digest of the prompt.
    """

    row: int  # of its unit
    basis: str
    opinion: Opinion


def pack(said: Sequence[Said]) -> bytes:
    """Opinions as JSON, field by field; NaN becomes null."""
    fields = map(list, zip(*(one.opinion[:-1] for one in said), strict=True))
    columns = [[one.row for one in said], [one.basis for one in said], *fields]
    return orjson.dumps(columns, option=orjson.OPT_SERIALIZE_NUMPY)


def unpack(body: bytes) -> Iterator[Said]:
    """The inverse of `pack`."""
    return map(Said, *opinion_columns(body))


def opinion_columns(body: bytes) -> tuple[list[int], list[str], Iterator[Opinion]]:
    """Rows of the unit, bases and opinions."""
    rows, bases, answers, texts, nll, entropy, probabilities, *tokens = orjson.loads(body)
    if len(tokens) == 2:  # stored before it was noted which texts were cut off
        tokens.append([False] * len(rows))
    columns = (
        answers,
        texts,
        [math.nan if value is None else value for value in nll],
        [math.nan if value is None else value for value in entropy],
        [None if values is None else tuple(values) for values in probabilities],
        *tokens,
        [""] * len(rows),
    )
    return rows, bases, map(Opinion._make, zip(*columns, strict=True))
