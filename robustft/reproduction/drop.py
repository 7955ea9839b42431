"""DROP's official metric: exact match and F1 of bags of words over aligned spans.

Dua et al. 2019 (arXiv 1903.00161) with the rules of their evaluation script: lower case; words
split at spaces and hyphens; punctuation dropped except in numbers; numbers by value ("2.0" is
"2"); articles dropped. A gold span with numbers matches only a span that shares one of them.
Spans are aligned one to one so that F1 is greatest; F1 is the mean over the longer of the two
lists, rounded to two digits. Of several gold answers the best one counts.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MANY = 200  # spans of one answer; a reply that lists more is no answer


def drop_score(said: Sequence[str], gold: Sequence[str]) -> tuple[bool, float]:
    """(exact match, F1 in [0, 1]) of predicted spans against the spans of one gold answer."""
    said, gold = list(said)[:_MANY] or [""], list(gold)[:_MANY] or [""]
    spans, wanted = [normalised(text) for text in said], [normalised(text) for text in gold]
    exact = set(spans) == set(wanted) and len(spans) == len(wanted)
    bags, golds = [set(text.split()) for text in spans], [set(text.split()) for text in wanted]
    scores = np.zeros((len(golds), len(bags)))
    for row, one in enumerate(golds):
        for column, other in enumerate(bags):
            if _share_a_number(one, other):
                scores[row, column] = _f1(other, one)
    rows, columns = linear_sum_assignment(-scores)
    best = np.zeros(max(len(golds), len(bags)))
    best[rows] = scores[rows, columns]
    return exact, float(round(best.mean(), 2))


def best_score(said: Sequence[str], golds: Sequence[Sequence[str]]) -> tuple[bool, float]:
    """The greatest (exact match, F1) over several gold answers."""
    return max((drop_score(said, gold) for gold in golds), default=(False, 0.0))


def gold_spans(answer: Mapping[str, Any]) -> list[str]:
    """The spans of an answer as DROP's files have it: a number, spans, or a date."""
    if str(answer.get("number") or "").strip():
        return [str(answer["number"])]
    if answer.get("spans"):
        return [str(span) for span in answer["spans"]]
    date = answer.get("date") or {}
    return [" ".join(str(date[part]) for part in ("day", "month", "year") if date.get(part))]


def normalised(text: str) -> str:
    """A span as the metric compares it."""
    words = (_plain(word) for word in re.split(" |-", text.lower()))
    return " ".join(" ".join(words).split())


def _plain(word: str) -> str:
    if not _is_number(word):
        word = word.translate(_PUNCTUATION)
    if _is_number(word):
        word = str(float(word))
    return " ".join(_ARTICLES.sub(" ", word).split())


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _share_a_number(gold: set[str], said: set[str]) -> bool:
    numbers = {word for word in gold if _is_number(word)}
    return not numbers or bool(numbers & said)


def _f1(said: set[str], gold: set[str]) -> float:
    common = len(said & gold)
    precision = common / len(said) if said else 1.0
    recall = common / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
