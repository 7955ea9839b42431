"""The outputs: the training set, a verdict on every record, the rejects, and their numbers.

One pass over the input; opinions come from the stores of the shards, nobody is asked anything.
"""

from __future__ import annotations

import heapq
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from robustft.config import CleanConfig
from robustft.confusions import Confusion, Confusions
from robustft.corpus import Corpus
from robustft.crowd import Estimate
from robustft.decisions import Selection
from robustft.detection import Asked, Conclusion, Detection, agrees
from robustft.files import atomic_file, replacing
from robustft.opinions import Opinion, opinion_of
from robustft.progress import Progress
from robustft.prompts import LETTERS
from robustft.records import Place, Record, RecordSource, RecordWriter, output_name
from robustft.relabeling import NewLabel, relabel
from robustft.second_opinions import SecondOpinions
from robustft.shards import Published, Shard
from robustft.store import Store

_log = logging.getLogger("robustft")
_SUSPICIOUS = 20
_SCORE_BINS = 24
_VERDICTS = {False: "clean", True: "noisy"}


@dataclass(slots=True)
class Judged:
    """One record with everything that was said about it, and what became of it."""

    record: Record
    opinions: dict[str, Opinion]  # of the experts that were asked, in the order they were
    detection: Detection
    label: NewLabel | None = None
    neighbours: tuple[tuple[float, Record], ...] = ()  # cosine and record, nearest first
    action: str = "keep"  # keep, relabel, drop
    answer: str = ""
    cause: str = ""  # why this action, in words that many records share
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether an opinion is lacking because the engine could not be reached."""
        return any([said.failure for said in self.opinions.values()])


@dataclass(slots=True)
class CleanResult:
    """What `clean` did; the counts add up: keep + relabel + drop + rejected = input."""

    out: Path
    cleaned: Path
    counts: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    threshold: float = float("nan")  # largest response entropy kept, nats (eq. 8)
    # By stage, over all sessions; "total" is the wall time of this one.
    seconds: dict[str, float] = field(default_factory=dict)
    earlier: float | None = None  # seconds of earlier sessions; None where shards were merged
    suspicious: list[Judged] = field(default_factory=list, repr=False)
    score_counts: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((2, _SCORE_BINS), np.int64), repr=False
    )
    kept_nll: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), repr=False)
    dropped_nll: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), repr=False)
    answers_before: Counter[str] = field(default_factory=Counter)
    answers_after: Counter[str] = field(default_factory=Counter)
    options: set[tuple[str, ...]] = field(default_factory=set)  # all, where records share them
    confusions: tuple[Confusion, ...] = ()  # options given in place of others, commonest first
    reasons: Counter[str] = field(default_factory=Counter)  # action and cause -> records
    reject_reasons: Counter[str] = field(default_factory=Counter)
    # (expert, "asked" | "answered" | "agreed" with the given answer) -> records
    tallies: Counter[tuple[str, str]] = field(default_factory=Counter)
    weights: dict[str, float] = field(default_factory=dict)  # expert -> share of the crowd's vote
    others: tuple[str, ...] = ()  # other models whose second opinions were heard
    noise_rate: Estimate | None = None  # share of wrong given answers, where it can be told
    expected_precision: float = float("nan")  # share of the noisy verdicts that are right
    cut_off: int = 0  # replies in text that did not end within --answer-tokens: no answers
    unanswered: int = 0  # records for which the engine failed; asked again on resume
    powerless: bool = False  # no expert was better than chance: nothing was changed
    next_steps: tuple[str, ...] = ()  # commands worth running now

    @property
    def left(self) -> int:
        """How many records the training set holds."""
        return self.counts["keep"] + self.counts["relabel"]

    @property
    def estimate(self) -> str:
        """The noise rate and the worth of the verdicts in words; empty where unknown."""
        if self.noise_rate is None:
            return ""
        words = f"an estimated {self.noise_rate} of the given answers are wrong"
        if math.isnan(self.expected_precision):
            return words
        return f"{words}; of those found noisy, about {self.expected_precision:.0%} are"

    def warn(self, text: str) -> None:
        """Tell the user now, and the report later."""
        self.warnings.append(text)
        _log.warning(text)


def write_outputs(
    config: CleanConfig,
    source: RecordSource,
    parts: Iterator[tuple[Shard, Store]],
    corpus: Corpus,
    conclusion: Conclusion,
    selection: Selection,
) -> CleanResult:
    """Write cleaned.*, verdicts.jsonl and rejects.jsonl; returns what they hold in numbers."""
    out = config.out
    result = CleanResult(
        out, out / output_name(source), weights=dict(conclusion.weights),
        powerless=conclusion.powerless, threshold=selection.threshold,
        noise_rate=conclusion.noise_rate, expected_precision=conclusion.expected_precision,
        kept_nll=selection.kept, dropped_nll=selection.dropped,
        others=SecondOpinions(config.second_opinion).names,
    )  # fmt: skip
    total, noisy = len(conclusion.noisy), int(conclusion.noisy.sum())
    unjudged = int(conclusion.silent.sum())
    result.counts.update(clean=total - noisy - unjudged, noisy=noisy, unjudged=unjudged)
    result.reject_reasons = corpus.intake.reject_reasons
    suspicious: list[tuple[float, int, Judged]] = []
    confusions = Confusions(len(conclusion.votes), conclusion.pooled.shape[1])
    with ExitStack() as stack:
        cleaned = stack.enter_context(RecordWriter(result.cleaned, source))
        verdicts = stack.enter_context(atomic_file(out / "verdicts.jsonl"))
        progress = stack.enter_context(Progress("write", len(conclusion.noisy), unit="records"))
        rows = corpus.intake.rows(source)
        for judged in _judged(config, parts, corpus, conclusion):
            lines = []
            for one, (place, row) in zip(judged, rows, strict=False):
                settle(one, selection, partial(source.refusal, row))
                if one.action != "drop":
                    cleaned.write_row(row, one.answer if one.action == "relabel" else None)
                lines.append(verdict_line(one, place))
                entry = (one.detection.noise_score, -one.record.index, one)
                if math.isnan(entry[0]):
                    continue
                if len(suspicious) < _SUSPICIOUS:
                    heapq.heappush(suspicious, entry)
                elif entry > suspicious[0]:
                    heapq.heapreplace(suspicious, entry)
            _count(result, judged)
            _count_confusions(confusions, judged, conclusion)
            verdicts.write(b"".join(lines))
            progress.update(len(judged))
        source.require_unchanged()  # or rows of now would stand under verdicts of then
    with replacing(out / "rejects.jsonl") as temporary:
        shutil.copyfile(corpus.intake.rejects_file, temporary)
    result.confusions = confusions.found()
    result.suspicious = [one for _, _, one in sorted(suspicious, reverse=True)]
    return result


def _judged(
    config: CleanConfig,
    parts: Iterator[tuple[Shard, Store]],
    corpus: Corpus,
    conclusion: Conclusion,
) -> Iterator[list[Judged]]:
    """The records with all that was said of them, unit by unit, in input order."""
    for shard, store in parts:
        panels = _Panels(config, shard, store, corpus, conclusion)
        for unit, chunk in corpus.intake.units(shard):
            yield panels.judge(unit, chunk)


class _Panels:
    """The stored opinions on the units of one shard."""

    def __init__(
        self,
        config: CleanConfig,
        shard: Shard,
        store: Store,
        corpus: Corpus,
        conclusion: Conclusion,
    ) -> None:
        self._without = config.without
        self._others = SecondOpinions(config.second_opinion)
        self._store = store
        self._corpus = corpus
        self._conclusion = conclusion
        found = Published(shard.phase("relabeled"))
        self._again: Iterator[tuple[list[int], list[float]]] = zip(
            map(np.ndarray.tolist, found["ids"]), map(np.ndarray.tolist, found["cosines"]),
            strict=True,
        )  # fmt: skip

    def judge(self, unit: int, chunk: Sequence[Record]) -> list[Judged]:
        """The records of a unit, which follows the one before, with all that was said of them."""
        said, failures = self._store.panel(unit)
        rows = range(len(chunk))
        parts = {"base": "base", "reasoned": "rel", "checker": "checker"}
        panel = {
            name: [opinion_of(said[name], row, failures) for row in rows]
            for name, part in parts.items()
            if part not in self._without
        }
        nobody: list[None] = [None] * len(chunk)
        asked = list(map(Asked, chunk, *(panel.get(name, nobody) for name in parts)))
        opinions = [dict(zip(panel, row, strict=True)) for row in zip(*panel.values(), strict=True)]
        for row, others in enumerate(self._others.unit(unit, chunk)):
            opinions[row].update(zip(self._others.names, others, strict=True))
        for row, opinion in said.get("tuned", {}).items():
            opinions[row]["tuned"] = opinion
        start = chunk[0].index if chunk else 0
        for row, name, opinion in self._conclusion.learners_said(start, len(chunk)):
            opinions[row][name] = opinion
        judged = list(map(Judged, chunk, opinions, self._conclusion.detections(asked)))
        for row, one in zip(rows, judged, strict=True):
            if one.detection.noisy:
                self._add_label(one, said, row, failures)
        return judged

    def _add_label(
        self,
        judged: Judged,
        said: dict[str, dict[int, Opinion]],
        row: int,
        failures: dict[int, str],
    ) -> None:
        ids, cosines = next(self._again)
        own = self._conclusion.own_label(judged.record)
        if own is not None:
            judged.label = NewLabel(own[0], own[1], "label from the crowd")
            return
        opinions = judged.opinions
        if "cer" not in self._without:
            opinions["context"] = opinion_of(said["context"], row, failures)
        if "reviewer" not in self._without:
            opinions["review"] = opinion_of(said["review"], row, failures)
        judged.neighbours = tuple(
            (cosine, self._corpus.record(position))
            for position, cosine in zip(ids, cosines, strict=True)
            if position >= 0
        )
        judged.label = relabel(
            opinions.get("reasoned"), opinions["base"], opinions.get("context"),
            opinions.get("review"),
        )  # fmt: skip


def settle(judged: Judged, selection: Selection, refusal: Callable[[str], str | None]) -> None:
    """The final action on one record, with its cause.

    `refusal` says of a new answer why it cannot be written, None where it can. A record whose new
    answer cannot is dropped; another is not selected in its place.
    """
    at = judged.record.index
    judged.answer, judged.cause = judged.record.answer, "found clean"
    label, refused = judged.label, None
    if label is None and math.isnan(judged.detection.noise_score):
        judged.cause = "not judged"
    elif label is None and selection.doubtful[at]:
        judged.action, judged.cause = "drop", "given answer too uncertain"
    if label is not None:
        if label.answer is None:
            judged.action, judged.cause = "drop", "no expert gave an answer"
            if judged.failed:
                judged.cause = "not answered again"
        elif not selection.selected[at]:
            judged.action = "drop"
            judged.cause = "new label too uncertain"
        elif agrees(judged.record, Opinion(label.answer)):
            judged.cause = "given answer confirmed"
        elif refused := refusal(label.answer):
            judged.action, judged.cause = "drop", "new answer does not fit the column"
        else:
            judged.action, judged.answer = "relabel", label.answer
            judged.cause = "new label"
    parts = [judged.detection.reason]
    if not judged.detection.reason.startswith(judged.cause):  # "not judged: base: no reply"
        parts.append(refused or judged.cause)
    if label is not None and label.answer is not None:
        parts.append(f"{label.reason}: {label.answer}{_confidence(judged, label, selection)}")
    elif label is not None:
        parts[1:] = [label.reason]
    judged.reason = "; ".join(parts)


def _confidence(judged: Judged, label: NewLabel, selection: Selection) -> str:
    """The response entropy of a new label and, where that was too high, what was not."""
    if not math.isfinite(label.nll):
        return ""
    said = f"nll {label.nll:.3f}"
    at = judged.record.index
    if not selection.selected[at]:
        own = int(selection.label[at])
        cut = selection.cuts.get(own, math.nan)
        among = f" of {LETTERS[own]}" if own >= 0 else ""
        said += f"; none{among} is kept" if math.isnan(cut) else f"; kept{among}: up to {cut:.3f}"
    return f" ({said})"


def _count(result: CleanResult, judged: Sequence[Judged]) -> None:
    """Add the records of a unit up."""
    result.counts.update(one.action for one in judged)
    result.reasons.update(f"{one.action}: {one.cause}" for one in judged)
    scores = np.array([one.detection.noise_score for one in judged])
    noisy = np.array([one.detection.noisy for one in judged], np.int64)
    noisy, scores = noisy[~np.isnan(scores)], scores[~np.isnan(scores)]
    bins = np.minimum((scores * _SCORE_BINS).astype(np.int64), _SCORE_BINS - 1)
    np.add.at(result.score_counts, (noisy, bins), 1)
    asked: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    agreed: Counter[str] = Counter()
    for one in judged:
        for name, said in one.opinions.items():
            asked[name] += 1
            result.cut_off += said.cut_off
            if said.answer is not None:
                answered[name] += 1
                yes = said.answer == "yes" if name == "checker" else agrees(one.record, said)
                agreed[name] += yes
    for what, counts in (("asked", asked), ("answered", answered), ("agreed", agreed)):
        result.tallies.update({(name, what): counts[name] for name in asked})
    result.unanswered += sum(one.failed for one in judged)
    lettered = [one for one in judged if one.record.options is not None]
    if len(result.options) < 2:
        result.options.update(one.record.options or () for one in lettered)
    result.answers_before.update(one.record.answer for one in lettered)
    result.answers_after.update(one.answer for one in lettered if one.action != "drop")


def _count_confusions(
    confusions: Confusions, judged: Sequence[Judged], conclusion: Conclusion
) -> None:
    start = judged[0].record.index
    rows = slice(start, start + len(judged))
    confusions.add(
        [one.record for one in judged], conclusion.jury[rows], conclusion.pooled[rows],
        conclusion.noisy[rows], conclusion.silent[rows],
    )  # fmt: skip


def verdict_line(judged: Judged, place: Place) -> bytes:
    """One line of verdicts.jsonl on the record that stands at `place` in the input.

    `line` counts from 1 within its file; `file`, the file's name relative to the input's folder, is
    told only where the input has several. The lines of rejects.jsonl tell both in the same way.
    """
    record, score = judged.record, judged.detection.noise_score
    experts: dict[str, Any] = {}
    for name, opinion in judged.opinions.items():
        experts[name] = {
            "answer": opinion.answer, "nll": opinion.nll, "entropy": opinion.entropy,
        }  # fmt: skip
        if opinion.probabilities is not None:
            experts[name]["probabilities"] = opinion.probabilities
    body = {
        "id": record.id,
        **place.told,
        "verdict": "not judged" if math.isnan(score) else _VERDICTS[judged.detection.noisy],
        "noise_score": None if math.isnan(score) else round(score, 6),
        "action": judged.action,
        "given": record.answer,
        "answer": None if judged.action == "drop" else judged.answer,
        "experts": experts,
        "neighbours": [{"id": near.id, "cosine": cosine} for cosine, near in judged.neighbours],
        "reason": judged.reason,
    }
    return orjson.dumps(body) + b"\n"
