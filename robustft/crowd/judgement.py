"""What a crowd concludes about a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share in [0, 1] with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """As in `31 % (28 to 34)`."""
        return f"{self.value:.0%} ({100 * self.low:.0f} to {100 * self.high:.0f})"


@dataclass(frozen=True, slots=True)
class Judgement:
    """Probabilities that given answers are wrong, and what they say about the whole corpus."""

    wrong: Floats  # [N] probability that the given answer is wrong
    noise_rate: Estimate | None  # share of wrong answers; None where nobody can tell
    weights: Mapping[str, float] = field(default_factory=dict)  # share of the vote; 0 = muted
    labels: Floats | None = None  # [N, C] probability of every option being the right one
    learned: Mapping[str, Floats] = field(default_factory=dict)  # learner that votes -> its [N, C]
    # By the panel without those who have learnt from the labels; None where it is alone or unsure.
    rate_by_panel: Estimate | None = None

    @property
    def powerless(self) -> bool:
        """Whether no expert does better than chance."""
        return not any(self.weights.values())

    def expected_precision(self, threshold: float = 0.5) -> float:
        """Expected share of truly wrong answers among those flagged; NaN where none is.

        Without an interval: it is as good as the probabilities' calibration, which no count of
        records improves.
        """
        flagged = self.wrong > threshold
        return float(self.wrong[flagged].mean()) if flagged.any() else float("nan")


def rate_estimate(rates: Floats, weights: Floats, count: int) -> Estimate:
    """The noise rate, averaged over hypotheses.

    rates, weights: [H] the rate under each hypothesis and the hypothesis' posterior probability.
    count: records; a corpus of n records at rate r holds r n wrong answers give or take a binomial
    deviation.
    """
    mean = float(weights @ rates)
    spread = float(weights @ (rates - mean) ** 2) + mean * (1.0 - mean) / max(count, 1)
    half = 1.96 * spread**0.5
    return Estimate(mean, max(mean - half, 0.0), min(mean + half, 1.0))
