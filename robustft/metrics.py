"""Figures of merit for answers: accuracy with its interval, macro-F1; and how many a share is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

_Z = 1.959963984540054  # 95 %


@dataclass(slots=True)
class Tally:
    """Correct answers among all."""

    total: int = 0
    correct: int = 0

    def add(self, correct: bool) -> None:
        """Count one answer."""
        self.total += 1
        self.correct += correct

    @property
    def accuracy(self) -> float:
        """Share of correct answers; NaN without any."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson(self.correct, self.total)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for `correct` of `total`; (0, 1) without any.

    Unlike the normal approximation it stays within [0, 1] and holds for few records and for
    accuracies near 0 and 1 (Wilson 1927).
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, _Z * _Z
    centre = share + z2 / (2 * total)
    half = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    scale = 1 + z2 / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def macro_f1(pairs: Mapping[tuple[str, str | None], int]) -> float:
    """Unweighted mean of F1 over the classes that occur, from counts of (expected, predicted).

    A prediction of None belongs to no class. As sklearn.metrics.f1_score(average="macro",
    zero_division=0) over the union of expected and predicted classes.
    """
    expected: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    for (truth, guess), number in pairs.items():
        expected[truth] += number
        if guess is not None:
            predicted[guess] += number
    classes = sorted({*expected, *predicted})
    scores = [2 * pairs.get((c, c), 0) / (expected[c] + predicted[c]) for c in classes]
    return sum(scores) / len(scores) if scores else math.nan


def share_of(share: float, count: int) -> int:
    """How many of `count` a share in [0, 1] is, rounded half up, as it is written in decimals.

    In binary 0.7 * 45 is 31.499…, half a record short of what was asked for.
    """
    return int(Fraction(str(float(share))) * count + Fraction(1, 2))
