"""The main job in phases: detect, conclude, relabel, select. Composition only.

    take in   once         the input, read (`robustft.intake`)
    detect    each shard   every expert's opinion, and from it the evidence on each record
    conclude  once         the split into clean and noisy, from the evidence of all shards
    relabel   each shard   noisy records answered again, the clean ones of all shards in view
    select    once         the most confident share, over all shards

A run on one machine has one shard. A phase goes unit by unit, in input order, and holds one unit in
memory, or a few where a server answers; a killed run finds what is finished in its store, and what
a phase has published stays.
`robustft.decisions` concludes and selects, `robustft.verdicts` writes the outputs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from robustft.config import CleanConfig
from robustft.corpus import Corpus, EmbeddingWriter
from robustft.decisions import make_detector
from robustft.detection import Asked, Conclusion, stacked
from robustft.embedding import TextEmbedder
from robustft.engines import Engine
from robustft.experts import Neighbour, Panel
from robustft.intake import Intake
from robustft.opinions import Opinion, opinion_of
from robustft.overlap import asked
from robustft.progress import Progress
from robustft.records import Record
from robustft.relabeling import relabel
from robustft.second_opinions import SecondOpinions
from robustft.shards import Shard, publish
from robustft.store import UNIT_ROWS, Stopwatch, Store
from robustft.wording import keep_wording

_SECONDS_BETWEEN_MARKS = 2.0  # what a killed run embeds again at most; opinions are never lost

Arrays = Mapping[str, NDArray[Any]]
# Of each record the opinions of base, reasoning expert and checker.
_Panel: TypeAlias = tuple[Sequence[Opinion], Sequence[Opinion | None], Sequence[Opinion | None]]


@dataclass(frozen=True, slots=True)
class Effort:
    """Estimated work of one record, for the ETA: tokens decoded; a prefill counts as 24."""

    config: CleanConfig

    def of(self, expert: str) -> float:
        """Work of one question to an expert."""
        return self.config.experts.reasoning_tokens if expert in ("reasoning", "reflection") else 24

    @property
    def detect(self) -> float:
        """Work of detection."""
        total = self.of("base")
        if "rel" not in self.config.without:
            chain = self.of("reasoned") + 2 * self.config.experts.rounds * self.of("reasoning")
            total += self.config.experts.samples * chain
        return total + ("checker" not in self.config.without) * self.of("checker")

    @property
    def relabel(self) -> float:
        """Work of relabeling a noisy record."""
        parts = {"cer": "context", "reviewer": "review"}
        return sum(self.of(e) for part, e in parts.items() if part not in self.config.without)


@contextlib.contextmanager
def long_lived() -> Iterator[None]:
    """Spare the garbage collector what exists by now: modules and models.

    It would walk over all of them again and again, for a quarter of the time beside the model.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class ShardRun:
    """The phases of one shard, in its folder; what they find one by one goes to its store."""

    def __init__(
        self,
        config: CleanConfig,
        shard: Shard,
        intake: Intake,
        engine: Engine,
        embedder: TextEmbedder,
        store: Store,
        *,
        quiet: bool = False,
    ) -> None:
        self.config = config
        self.quiet = quiet
        self.shard = shard
        self.intake = intake
        self.engine = engine
        self.embedder = embedder
        self.store = store
        self._truncated = 0  # prompts cut before this phase
        self._panel = Panel(
            engine, store, config.experts, seed=config.seed, progress=self._on_answers
        )
        self._effort = Effort(config)
        self._others = SecondOpinions(config.second_opinion)
        self._progress: Progress | None = None
        self._keep_time: Callable[[], None] = lambda: None

    # --- detect ----------------------------------------------------------------------------

    def detect(self) -> None:
        """Ask the panel about every record and publish the evidence."""
        target = self.shard.phase("detected")
        if target.is_dir():
            return
        keep_wording(self.store, self.engine)
        self._start_clock("detect")
        detector = make_detector(self.config)
        done = set(self.store.finished("detect"))
        held = min(len(self.store.finished("corpus")) * UNIT_ROWS, self.shard.rows)
        with (
            EmbeddingWriter(self.shard.folder, self.embedder.dimensions, held) as embeddings,
            self._shown("detect", self.shard.rows * self._effort.detect),
        ):
            marks = _Marks(self.store, ("corpus", "detect"), embeddings.sync)

            def questions() -> Iterator[tuple[tuple[int, list[Record]], Callable[[], _Panel]]]:
                for unit, chunk in self.intake.units(self.shard):
                    if chunk[-1].index - self.shard.start >= embeddings.rows:
                        embeddings.append(self.embedder.encode([one.question for one in chunk]))
                        marks.add("corpus", unit, {})
                    if unit in done:
                        self._skip(len(chunk) * self._effort.detect)
                    else:
                        yield (unit, chunk), functools.partial(self._ask_panel, unit, chunk)

            with asked(self.engine, questions()) as answered:
                for (unit, chunk), said in answered:
                    judged = list(map(Asked, chunk, *said, self._others.unit(unit, chunk)))
                    marks.add("detect", unit, detector.evidence(judged))
            marks.flush()
        publish(target, stacked(list(self.store.arrays("detect"))), self._facts())
        self._keep_time()

    def _ask_panel(self, unit: int, chunk: Sequence[Record]) -> _Panel:
        """What base, reasoning expert and checker say about each record."""
        without = self.config.without
        panel = self._panel.at(unit)
        base = panel.base(chunk)
        reasoned: Sequence[Opinion | None] = [None] * len(chunk)
        if "rel" not in without:
            reasoned = panel.reasoning(chunk)
        checker: Sequence[Opinion | None] = [None] * len(chunk)
        if "checker" not in without:
            said = [[o for o in pair if o] for pair in zip(base, reasoned, strict=True)]
            checker = panel.checker(chunk, said)
        return base, reasoned, checker

    # --- relabel ---------------------------------------------------------------------------

    def relabel(self, conclusion: Conclusion, corpus: Corpus) -> None:
        """Answer the noisy records again; publish their confidence and neighbours.

        For the m noisy records in input order: nll [m] (eq. 7, nats; NaN without a label), ids and
        cosines [m, k] of the neighbours shown, nearest first (id -1: none).
        """
        target = self.shard.phase("relabeled")
        if target.is_dir():
            return
        keep_wording(self.store, self.engine)
        self._start_clock("relabel")
        done = set(self.store.finished("relabel"))
        noisy = np.flatnonzero(conclusion.noisy[self.shard.start : self.shard.stop])
        noisy += self.shard.start
        with self._shown("relabel", len(noisy) * self._effort.relabel):
            marks = _Marks(self.store, ("relabel",), lambda: None)

            def questions() -> Iterator[tuple[int, Callable[[], Arrays]]]:
                for unit in self.shard.units:
                    low, high = np.searchsorted(noisy, (unit * UNIT_ROWS, (unit + 1) * UNIT_ROWS))
                    if unit in done:
                        self._skip((high - low) * self._effort.relabel)
                        continue
                    chunk = self.intake.unit(unit) if high > low else []
                    mine = [chunk[position % UNIT_ROWS] for position in noisy[low:high].tolist()]
                    yield unit, self._relabeling(unit, mine, conclusion, corpus)

            with asked(self.engine, questions()) as answered:
                for unit, found in answered:
                    marks.add("relabel", unit, found)
            marks.flush()
        publish(target, stacked(list(self.store.arrays("relabel"))), self._facts())
        self._keep_time()

    def _start_clock(self, phase: str) -> None:
        """Keep a phase's time, that of killed sessions included up to their last answers."""
        watch = Stopwatch(self.store.seconds(phase))
        self._keep_time = lambda: self.store.keep_seconds(phase, watch.seconds())

    def _facts(self) -> dict[str, Any]:
        """What a phase says of itself: the prompts it cut in this session."""
        truncated = self.engine.truncated
        facts = {"truncated": truncated - self._truncated}
        self._truncated = truncated
        return facts

    def _relabeling(
        self, unit: int, records: Sequence[Record], conclusion: Conclusion, corpus: Corpus
    ) -> Callable[[], Arrays]:
        """Look up what a unit's noisy records are shown; what it returns asks, in any thread."""
        nll = np.full(len(records), np.nan)
        width = 0 if "cer" in self.config.without else min(self.config.k, len(conclusion.noisy))
        ids = np.full((len(records), width), -1, np.int64)
        cosines = np.full((len(records), width), np.nan, np.float32)
        undecided = []
        for row, record in enumerate(records):
            own = conclusion.own_label(record)
            if own is None:
                undecided.append(row)
            else:
                nll[row] = own[1]
        chosen = [records[row] for row in undecided]
        if chosen and width and conclusion.clean.any():
            positions = np.array([record.index for record in chosen])
            # Long questions that begin alike share one embedding: that is looked up once.
            rows, which = np.unique(corpus[positions], axis=0, return_inverse=True)
            found = corpus.index().search(rows, width, allowed=conclusion.clean)
            ids[undecided], cosines[undecided] = (part[which.reshape(-1)] for part in found)
        near = [[p for p in ids[row].tolist() if p >= 0] for row in undecided]
        shown = {position: corpus.record(position) for some in near for position in some}
        examples = [
            [(shown[p].question, shown[p].options, shown[p].answer) for p in some] for some in near
        ]

        def ask() -> Arrays:
            if chosen:
                nll[undecided] = self._ask_again(unit, chosen, examples)
            return {"nll": nll, "ids": ids, "cosines": cosines}

        return ask

    def _ask_again(
        self, unit: int, records: Sequence[Record], examples: Sequence[Sequence[Neighbour]]
    ) -> list[float]:
        """Context and review (eq. 5, 6); the response entropy of each new label, or NaN."""
        without = self.config.without
        panel = self._panel.at(unit)
        said, failures = self.store.panel(unit)
        rows = [record.index % UNIT_ROWS for record in records]
        base = [opinion_of(said["base"], row, failures) for row in rows]
        reasoned: list[Opinion | None] = [None] * len(rows)
        if "rel" not in without:
            reasoned = [opinion_of(said["reasoned"], row, failures) for row in rows]
        context: Sequence[Opinion | None] = [None] * len(rows)
        if "cer" not in without:
            context = panel.context(records, examples)
        review: Sequence[Opinion | None] = [None] * len(rows)
        if "reviewer" not in without:
            first = [c or b for c, b in zip(context, base, strict=True)]
            second = [r or b for r, b in zip(reasoned, base, strict=True)]
            review = panel.review(records, first, second)
        labels = map(relabel, reasoned, base, context, review)
        # Without any log-probabilities nothing can be ranked, and everything is kept.
        unranked = float("nan" if self.engine.abilities.nll else "inf")
        return [
            float("nan") if label.answer is None
            else unranked if math.isnan(label.nll)
            else label.nll
            for label in labels
        ]  # fmt: skip

    # --- progress --------------------------------------------------------------------------

    def _shown(self, phase: str, total: float) -> Progress:
        name = phase if self.shard.of == 1 else f"shard {self.shard.name} {phase}"
        self._progress = Progress(name, total, quiet=self.quiet)
        return self._progress

    def _skip(self, amount: float) -> None:
        if self._progress is not None:
            self._progress.skip(amount)

    def _on_answers(self, expert: str, count: int) -> None:
        """Called in any thread."""
        self._keep_time()
        if self._progress is not None:
            self._progress.update(count * self._effort.of(expert), expert)


class _Marks:
    """Marks units as finished, a few seconds' worth at a time: `sync`, then one transaction."""

    def __init__(self, store: Store, phases: Sequence[str], sync: Callable[[], None]) -> None:
        self._store, self._sync = store, sync
        self._waiting: dict[str, list[tuple[int, Arrays]]] = {phase: [] for phase in phases}
        self._due = time.monotonic() + _SECONDS_BETWEEN_MARKS

    def add(self, phase: str, unit: int, arrays: Arrays) -> None:
        self._waiting[phase].append((unit, arrays))
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        self._sync()
        for phase, waiting in self._waiting.items():
            self._store.finish(phase, waiting)
            waiting.clear()
        self._due = time.monotonic() + _SECONDS_BETWEEN_MARKS
