"""What `report.html` is drawn from: typed, already counted, small whatever the corpus' size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from robustft.confusions import Confusion


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts over equal bins of [low, high]; values outside fall into the first or last bin.

    Binned while streaming, so that a report on ten million records needs no list of ten million
    scores. The right edge belongs to the last bin.
    """

    low: float
    high: float
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise ValueError on an empty range or without bins."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low < high must be finite, got {self.low} and {self.high}")
        if not self.counts:
            raise ValueError("counts must hold at least one bin, got none")

    @classmethod
    def of(
        cls, values: Iterable[float | None], low: float, high: float, bins: int = 24
    ) -> Histogram:
        """Bin `values`; None and NaN are left out."""
        counts = [0] * bins
        for value in values:
            if value is None or math.isnan(value):
                continue
            position = (min(max(value, low), high) - low) / (high - low)
            counts[min(int(position * bins), bins - 1)] += 1
        return cls(low, high, tuple(counts))

    @property
    def total(self) -> int:
        """How many values were counted."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Counts:
    """How many records went where.

    `input` = clean + noisy + unjudged + rejected = keep + relabel + drop + rejected.
    """

    input: int
    clean: int
    noisy: int
    keep: int
    relabel: int
    drop: int
    rejected: int
    unjudged: int = 0

    @property
    def records(self) -> int:
        """Lines that could be read."""
        return self.input - self.rejected


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """One expert's work: questions asked, answers read, answers equal to the given one, tokens.

    `learner`: it learnt from the corpus and was asked nothing.
    """

    name: str
    asked: int
    answered: int
    agreed: int
    prompt_tokens: int = 0
    generated_tokens: int = 0
    learner: bool = False


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model in use; `note` says what a reader must know (that it is a small one)."""

    role: str
    name: str
    revision: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one expert said about one question; `answer` None when none could be read."""

    expert: str
    answer: str | None
    nll: float | None = None  # eq. 7, nats per token of the answer
    entropy: float | None = None  # mean token entropy, nats


@dataclass(frozen=True, slots=True)
class NeighbourRow:
    """A clean question shown to the context expert."""

    id: str
    cosine: float
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Suspect:
    """One suspicious record, with everything a person needs to judge it."""

    id: str
    noise_score: float
    action: str  # keep, relabel or drop
    question: str
    given: str
    answer: str | None  # the final one; None: dropped
    options: tuple[str, ...] | None = None
    opinions: tuple[Opinion, ...] = ()
    neighbours: tuple[NeighbourRow, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything `report.html` shows. Mappings keep their order; empty ones are said to be empty.

    `before`/`after` count the answers of the input and of the cleaned set by letter, with its text
    where all records share their options. `scores_*` are histograms of the noise score, `nll_*` of
    eq. 7 for the denoised records that selection kept or dropped; `nll_threshold` is the highest
    nll kept.
    """

    source: str
    command: str
    version: str
    finished: str  # when, already formatted
    counts: Counts
    reasons: Mapping[str, int] = field(default_factory=dict)
    reject_reasons: Mapping[str, int] = field(default_factory=dict)
    before: Mapping[str, int] = field(default_factory=dict)
    after: Mapping[str, int] = field(default_factory=dict)
    scores_clean: Histogram | None = None
    scores_noisy: Histogram | None = None
    nll_kept: Histogram | None = None
    nll_dropped: Histogram | None = None
    nll_threshold: float | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    experts: tuple[ExpertRow, ...] = ()
    models: tuple[ModelRow, ...] = ()
    peak_memory_bytes: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # name -> what it holds
    next_steps: tuple[str, ...] = ()  # commands to run next
    warnings: tuple[str, ...] = ()  # what a reader must know before anything else
    weights: Mapping[str, float] = field(default_factory=dict)  # expert -> share of the vote
    estimate: str = ""  # noise rate and worth of the verdicts, in words
    powerless: bool = False  # no expert was better than chance: nothing was changed
    called: str = ""  # `1, 2, 3 are called A, B, C`, where the input's answers are no letters
    confusions: tuple[Confusion, ...] = ()  # options given in place of others, commonest first
    suspects: tuple[Suspect, ...] = ()  # most suspicious first; the first twenty are shown
