"""The main job: detect, relabel, select, write. Composition only; the stages are elsewhere.

The input is streamed three times (experts, relabeling, writing) and never held: what one record
leaves in memory is a few bytes, what later stages need of it lies in `run.sqlite` and
`embeddings.f32`. A resumed run repeats the passes and finds its opinions in the store.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from robustft.config import CleanConfig
from robustft.detection import (
    Asked,
    CrowdDetector,
    Detection,
    Detector,
    PaperDetector,
    agrees,
    unjudged,
)
from robustft.embedding import EmbeddingFile, TextEmbedder
from robustft.engines import Engine
from robustft.experts import Neighbour, Panel
from robustft.files import atomic_file
from robustft.progress import Progress
from robustft.records import Record, RecordSource, RecordWriter, Reject, output_name
from robustft.relabeling import NewLabel, relabel
from robustft.retrieval import CosineKNN
from robustft.selection import select_confident
from robustft.store import Opinion, Stopwatch, Store

_log = logging.getLogger("robustft")
_CHUNK = 512
_SUSPICIOUS = 20


@dataclass(slots=True)
class Judged:
    """One record on its way through the stages."""

    record: Record
    base: Opinion
    reasoned: Opinion | None
    checker: Opinion | None
    detection: Detection
    context: Opinion | None = None
    review: Opinion | None = None
    label: NewLabel | None = None
    neighbours: tuple[tuple[str, float, Neighbour], ...] = ()  # id, cosine, question and answer
    action: str = "keep"  # keep, relabel, drop
    answer: str = ""
    cause: str = ""  # why this action, in words that many records share
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether detection lacks an opinion because the engine could not be reached."""
        asked = (self.base, self.reasoned, self.checker)
        return any(said is not None and bool(said.failure) for said in asked)

    @property
    def opinions(self) -> dict[str, Opinion]:
        """The experts that were asked, in the order they were."""
        named = {
            "base": self.base,
            "reasoned": self.reasoned,
            "checker": self.checker,
            "context": self.context,
            "review": self.review,
        }
        return {name: opinion for name, opinion in named.items() if opinion is not None}


@dataclass(slots=True)
class CleanResult:
    """What `clean` did; the counts add up: keep + relabel + drop + rejected = input."""

    out: Path
    cleaned: Path
    counts: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    threshold: float = float("nan")  # largest response entropy kept, nats (eq. 8)
    seconds: dict[str, float] = field(default_factory=dict)
    suspicious: list[Judged] = field(default_factory=list)
    score_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, 24), np.int64))
    kept_nll: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    dropped_nll: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    answers_before: Counter[str] = field(default_factory=Counter)
    answers_after: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)  # action and cause -> records
    reject_reasons: Counter[str] = field(default_factory=Counter)
    # (expert, "asked" | "answered" | "agreed" with the given answer) -> records
    tallies: Counter[tuple[str, str]] = field(default_factory=Counter)
    weights: dict[str, float] = field(default_factory=dict)  # expert -> share of the crowd's vote
    unanswered: int = 0  # records for which the engine failed; asked again on resume
    powerless: bool = False  # no expert was better than chance: nothing was changed

    def warn(self, text: str) -> None:
        """Tell the user now, and the report later."""
        self.warnings.append(text)
        _log.warning(text)


class CleanRun:
    """One run over one output folder. `execute` does it all; the passes below are its steps."""

    def __init__(
        self, config: CleanConfig, source: RecordSource, engine: Engine, embedder: TextEmbedder,
        store: Store,
    ) -> None:  # fmt: skip
        self.config = config
        self.source = source
        self.engine = engine
        self.embedder = embedder
        self.store = store
        self.result = CleanResult(config.out, config.out / output_name(source))
        self._panel = Panel(
            engine, store, config.experts, seed=config.seed, progress=self._on_answers
        )
        self._progress: Progress | None = None
        self._counted: frozenset[str] = frozenset()  # experts whose answers move the bar
        self._noisy: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._unjudged: NDArray[np.bool_] = np.zeros(0, np.bool_)  # an expert was out of reach
        self._index: CosineKNN | None = None
        self._detector: Detector = PaperDetector()

    def execute(self, total: int) -> CleanResult:
        """Run every pass over the `total` records of the source."""
        self._noisy = np.zeros(total, np.bool_)
        self._unjudged = np.zeros(total, np.bool_)
        paper = self.config.detector == "paper"
        self._detector = PaperDetector() if paper else CrowdDetector(total)
        path = self.config.out / "embeddings.f32"
        with EmbeddingFile(path, self.embedder.dimensions) as embeddings:
            self._timed("detect", lambda: self._detect_all(embeddings))
            nll = self._timed("relabel", lambda: self._relabel_all(embeddings))
            selected = self._select(nll)
            self._timed("write", lambda: self._write_all(embeddings, nll, selected))
        if self.result.unanswered:
            self.result.warn(
                f"{self.result.unanswered} records got no reply from the engine on some question "
                "(verdicts.jsonl says why); the same command asks those questions again"
            )
        return self.result

    def _timed(self, stage: str, step: Any) -> Any:
        watch = Stopwatch()
        value = step()
        self.result.seconds[stage] = round(watch.seconds(), 3)
        return value

    # --- pass 1: experts and verdicts --------------------------------------------------------

    def _detect_all(self, embeddings: EmbeddingFile) -> None:
        steps = len(self._noisy) * self._detect_weight()
        self._counted = frozenset(("base", "reasoning", "reflection", "reasoned", "checker"))
        with Progress("detect", steps) as self._progress:
            for unit, chunk in self._chunks():
                self._panel.unit = unit
                self._remember(chunk, embeddings)
                self._detector.observe(self._ask_panel(chunk))
        self._progress = None
        for warning in self._detector.conclude(embeddings.memory_map()):
            self.result.warn(warning)
        self.result.powerless = getattr(self._detector, "powerless", False)
        self.result.weights = getattr(self._detector, "weights", {})
        for unit, chunk in self._chunks():
            self._panel.unit = unit
            for judged in self._judge(chunk):
                self._noisy[judged.record.index] = judged.detection.noisy
                self._unjudged[judged.record.index] = judged.failed
        noisy = int(self._noisy.sum())
        self.result.counts.update(clean=len(self._noisy) - noisy, noisy=noisy)

    def _judge(self, chunk: Sequence[Record]) -> list[Judged]:
        """The panel's opinions and the detector's verdict, once it has concluded."""
        return [
            Judged(
                asked.record,
                asked.base,
                asked.reasoned,
                asked.checker,
                unjudged(asked) or self._detector.detection(asked),
            )
            for asked in self._ask_panel(chunk)
        ]

    def _ask_panel(self, chunk: Sequence[Record]) -> list[Asked]:
        without = self.config.without
        base = self._panel.base(chunk)
        reasoned: Sequence[Opinion | None] = [None] * len(chunk)
        if "rel" not in without:
            reasoned = self._panel.reasoning(chunk)
        checker: Sequence[Opinion | None] = [None] * len(chunk)
        if "checker" not in without:
            said = [[o for o in pair if o] for pair in zip(base, reasoned, strict=True)]
            checker = self._panel.checker(chunk, said)
        return [Asked(*row) for row in zip(chunk, base, reasoned, checker, strict=True)]

    def _remember(self, chunk: Sequence[Record], embeddings: EmbeddingFile) -> None:
        """Keep what retrieval needs: the embedding and the text of each record."""
        if embeddings.rows > chunk[-1].index:
            return
        fresh = [record for record in chunk if record.index >= embeddings.rows]
        self.store.add_records((r.index, r.id, [r.question, r.options, r.answer]) for r in fresh)
        embeddings.append(self.embedder.encode([record.question for record in fresh]))

    # --- pass 2: neighbours, context, review ---------------------------------------------------

    def _relabel_all(self, embeddings: EmbeddingFile) -> NDArray[np.float64]:
        """Response entropy (eq. 7) by position; NaN where clean or without a label."""
        nll = np.full(len(self._noisy), np.nan)
        clean = int((~(self._noisy | self._unjudged)).sum())
        noisy = int(self._noisy.sum())
        if noisy == 0:
            return nll
        if "cer" not in self.config.without:
            if clean == 0:
                self.result.warn(
                    "no record was found clean: noisy ones are answered without examples"
                )
            elif clean < self.config.k:
                self.result.warn(
                    f"k is {self.config.k}, but only {clean} clean records exist: using {clean}"
                )
            if clean:
                self._index = CosineKNN(embeddings.memory_map(), threads=self.config.threads)
        self._counted = frozenset(("context", "review"))
        with Progress("relabel", noisy * self._relabel_weight()) as self._progress:
            for unit, chunk in self._chunks():
                self._panel.unit = unit
                rows = [record for record in chunk if self._noisy[record.index]]
                if rows:
                    for judged in self._relabel(self._judge(rows), embeddings):
                        if judged.label is not None and judged.label.answer is not None:
                            nll[judged.record.index] = judged.label.nll
        self._progress = None
        return nll

    def _relabel(self, noisy: Sequence[Judged], embeddings: EmbeddingFile) -> Sequence[Judged]:
        """Fill label, and where the panel decides it context, review and neighbours."""
        undecided = []
        for judged in noisy:
            own = self._detector.own_label(judged.record)
            if own is None:
                undecided.append(judged)
            else:
                judged.label = NewLabel(own[0], own[1], "label from the crowd")
        if undecided:
            self._relabel_by_panel(undecided, embeddings)
        return noisy

    def _relabel_by_panel(self, noisy: Sequence[Judged], embeddings: EmbeddingFile) -> None:
        without = self.config.without
        records = [judged.record for judged in noisy]
        context: Sequence[Opinion | None] = [None] * len(noisy)
        if "cer" not in without:
            found = self._neighbours(records, embeddings)
            near = [[neighbour for _, _, neighbour in row] for row in found]
            context = self._panel.context(records, near)
            for judged, row in zip(noisy, found, strict=True):
                judged.neighbours = tuple(row)
        review: Sequence[Opinion | None] = [None] * len(noisy)
        if "reviewer" not in without:
            first = [c or judged.base for c, judged in zip(context, noisy, strict=True)]
            second = [judged.reasoned or judged.base for judged in noisy]
            review = self._panel.review(records, first, second)
        for judged, by_context, by_review in zip(noisy, context, review, strict=True):
            judged.context, judged.review = by_context, by_review
            judged.label = relabel(judged.reasoned, judged.base, by_context, by_review)

    def _neighbours(
        self, records: Sequence[Record], embeddings: EmbeddingFile
    ) -> list[list[tuple[str, float, Neighbour]]]:
        """The k nearest clean records of each, nearest first (eq. 4)."""
        if self._index is None:
            return [[] for _ in records]
        queries = np.ascontiguousarray(
            embeddings.memory_map()[[record.index for record in records]]
        )
        k = min(self.config.k, len(self._noisy))
        ids, cosines = self._index.search(queries, k, allowed=~(self._noisy | self._unjudged))
        stored = self.store.records_at(sorted(set(ids[ids >= 0].tolist())))
        rows = []
        for row_ids, row_cosines in zip(ids.tolist(), cosines.tolist(), strict=True):
            row = []
            for position, cosine in zip(row_ids, row_cosines, strict=True):
                if position >= 0:
                    id_, (question, options, answer) = stored[position]
                    row.append((id_, cosine, (question, options, answer)))
            rows.append(row)
        return rows

    # --- selection -------------------------------------------------------------------------

    def _select(self, nll: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which noisy records are kept, by position (eq. 8)."""
        selected = np.zeros(len(nll), np.bool_)
        positions = np.flatnonzero(self._noisy & np.isfinite(nll))
        beta = 1.0 if "selection" in self.config.without else self.config.beta
        mask, self.result.threshold = select_confident(nll[positions], beta)
        selected[positions[mask]] = True
        self.result.kept_nll = nll[positions[mask]]
        self.result.dropped_nll = nll[positions[~mask]]
        return selected

    # --- pass 3: outputs -------------------------------------------------------------------

    def _write_all(
        self, embeddings: EmbeddingFile, nll: NDArray[np.float64], selected: NDArray[np.bool_]
    ) -> None:
        out = self.config.out
        suspicious: list[tuple[float, int, Judged]] = []
        with (
            RecordWriter(self.result.cleaned, self.source) as cleaned,
            atomic_file(out / "verdicts.jsonl") as verdicts,
            atomic_file(out / "rejects.jsonl") as rejects,
            Progress("write", len(nll), unit="records") as progress,
        ):

            def on_reject(reject: Reject) -> None:
                rejects.write(_reject_line(reject))
                self.result.reject_reasons[reject.reason] += 1

            for unit, chunk in self._chunks(on_reject):
                self._panel.unit = unit
                judged = self._judge(chunk)
                self._relabel([j for j in judged if j.detection.noisy], embeddings)
                for one in judged:
                    self._settle(one, bool(selected[one.record.index]))
                    self._count(one)
                    if one.action != "drop":
                        cleaned.write(one.record, one.answer)
                    verdicts.write(verdict_line(one))
                    entry = (one.detection.noise_score, -one.record.index, one)
                    if len(suspicious) < _SUSPICIOUS:
                        heapq.heappush(suspicious, entry)
                    else:
                        heapq.heappushpop(suspicious, entry)
                progress.update(len(chunk))
        self.result.suspicious = [one for _, _, one in sorted(suspicious, reverse=True)]

    def _settle(self, judged: Judged, selected: bool) -> None:
        """The final action on one record, with its cause."""
        judged.answer, judged.cause = judged.record.answer, "found clean"
        if judged.failed:
            judged.cause = "not judged"
        label = judged.label
        if label is not None:
            if label.answer is None:
                judged.action, judged.cause = "drop", "no expert gave an answer"
                if any(said.failure for said in judged.opinions.values()):
                    judged.cause = "not answered again"
            elif not selected:
                judged.action = "drop"
                judged.cause = "new label too uncertain"
            elif agrees(judged.record, Opinion(label.answer)):
                judged.cause = "given answer confirmed"
            else:
                judged.action, judged.answer = "relabel", label.answer
                judged.cause = "new label"
        parts = [judged.detection.reason, judged.cause]
        if label is not None and label.answer is not None:
            parts.append(f"{label.reason}: {label.answer} (nll {label.nll:.3f})")
        elif label is not None:
            parts[1] = label.reason
        judged.reason = "; ".join(parts)

    def _count(self, judged: Judged) -> None:
        result = self.result
        result.counts[judged.action] += 1
        result.reasons[f"{judged.action}: {judged.cause}"] += 1
        score, bins = judged.detection.noise_score, result.score_counts.shape[1]
        result.score_counts[int(judged.detection.noisy), min(int(score * bins), bins - 1)] += 1
        for name, said in judged.opinions.items():
            result.tallies[name, "asked"] += 1
            result.tallies[name, "answered"] += said.answer is not None
            agreed = said.answer == "yes" if name == "checker" else agrees(judged.record, said)
            result.tallies[name, "agreed"] += agreed
        result.unanswered += any(said.failure for said in judged.opinions.values())
        if judged.record.options is not None:
            result.answers_before[judged.record.answer] += 1
            if judged.action != "drop":
                result.answers_after[judged.answer] += 1

    # --- shared ----------------------------------------------------------------------------

    def _chunks(self, on_reject: Any = lambda reject: None) -> Iterator[tuple[int, list[Record]]]:
        """Numbered lists of at most _CHUNK records, in input order."""

        def records() -> Iterator[Record]:
            for item in self.source:
                if isinstance(item, Reject):
                    on_reject(item)
                else:
                    yield item

        stream = records()
        for unit in itertools.count():
            chunk = list(itertools.islice(stream, _CHUNK))
            if not chunk:
                return
            yield unit, chunk

    def _weight(self, expert: str) -> float:
        """Estimated work of one question, for the ETA: tokens decoded; a prefill costs about 24."""
        return self.config.experts.reasoning_tokens if expert in ("reasoning", "reflection") else 24

    def _detect_weight(self) -> float:
        total = self._weight("base")
        if "rel" not in self.config.without:
            rounds = self.config.experts.rounds
            total += self._weight("reasoned") + 2 * rounds * self._weight("reasoning")
        return total + ("checker" not in self.config.without) * self._weight("checker")

    def _relabel_weight(self) -> float:
        parts = {"cer": "context", "reviewer": "review"}
        return sum(self._weight(e) for s, e in parts.items() if s not in self.config.without)

    def _on_answers(self, expert: str, count: int) -> None:
        if self._progress is not None and expert in self._counted:
            self._progress.update(count * self._weight(expert), expert)


def _reject_line(reject: Reject) -> bytes:
    text = reject.data.decode("utf-8", "backslashreplace")
    body = {"line": reject.line, "reason": reject.reason, "bytes": reject.size, "data": text}
    return orjson.dumps(body) + b"\n"


def verdict_line(judged: Judged) -> bytes:
    """One line of verdicts.jsonl."""
    record = judged.record
    experts: dict[str, Any] = {}
    for name, opinion in judged.opinions.items():
        experts[name] = {
            "answer": opinion.answer, "nll": opinion.nll, "entropy": opinion.entropy,
        }  # fmt: skip
        if opinion.probabilities is not None:
            experts[name]["probabilities"] = opinion.probabilities
    body = {
        "id": record.id,
        "verdict": "noisy" if judged.detection.noisy else "clean",
        "noise_score": round(judged.detection.noise_score, 6),
        "action": judged.action,
        "given": record.answer,
        "answer": None if judged.action == "drop" else judged.answer,
        "experts": experts,
        "neighbours": [{"id": id_, "cosine": cosine} for id_, cosine, _ in judged.neighbours],
        "reason": judged.reason,
    }
    return orjson.dumps(body) + b"\n"


def count_records(items: Iterable[Record | Reject]) -> tuple[int, int, Reject | None]:
    """(records, rejects, first reject) of a source."""
    records = rejects = 0
    first: Reject | None = None
    for item in items:
        if isinstance(item, Reject):
            rejects += 1
            first = first or item
        else:
            records += 1
    return records, rejects, first
