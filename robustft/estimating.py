"""`clean --estimate`: what a corpus would cost, by a measured sample, before anything is spent."""

from __future__ import annotations

import contextlib
import logging
import resource
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from robustft.cleaning import load, open_source, run_clean
from robustft.config import CleanConfig, TunedConfig
from robustft.crowd.neighbours import VOTERS
from robustft.embedding import TextEmbedder
from robustft.engines import Engine
from robustft.files import atomic_file
from robustft.records import Record, RecordSource, watched
from robustft.retrieval import CosineKNN
from robustft.store import UNIT_ROWS, Stopwatch, Store
from robustft.terminal import counted

_LEARNT_AT_ONCE = 100_000  # of more records the embeddings are read in pieces
_WORTH_TELLING = 0.05  # least share of the hours that the search for neighbours is told from
_TRIED, _TRIED_AT_ONCE = 16_384, 256  # rows and queries of a search that is timed


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What cleaning `records` records takes on this machine; text for the user by `str`."""

    records: int
    rejects: int
    sample: int
    noisy: float  # share of the sample that was answered again
    prompt_tokens: int
    new_tokens: int
    hours: float
    least_hours: float  # where the crowd settles labels or judges nothing: none answered again
    search_hours: float  # of these for nearest neighbours, which grow with the records' square
    memory_bytes: int  # peak, this process
    disk_bytes: int  # --out
    shards: int = 1

    @property
    def largest_share(self) -> float:
        """The part of the records that falls to the largest shard; shards are whole units."""
        units = -(-self.records // UNIT_ROWS)
        return min(-(-units // self.shards) * UNIT_ROWS / self.records, 1.0)

    def __str__(self) -> str:
        search = ""
        if self.search_hours > _WORTH_TELLING * self.hours:
            search = f", up to {_duration(self.search_hours)} of it for nearest neighbours"
        time, most = self._time(1.0), ""
        if self.least_hours < 0.9 * self.hours:
            most = ", the more the more records are answered again"
        shards = []
        if self.shards > 1:
            each = f"{self._time(self.largest_share)} each, where every one has a machine or GPU"
            shards = [f"{f'{self.shards} shards':<14}{each} like this one to itself"]
        each_one = ", each" if shards else ""
        tokens = f"{self.prompt_tokens:,} prompt and {self.new_tokens:,} new tokens"
        return "\n".join(
            (
                f"{counted(self.records, 'record')}, {self.rejects:,} unreadable",
                f"tokens        {tokens}",
                f"time          {time} with one process like this one{most}{search}",
                *shards,
                f"memory        {_size(self.memory_bytes)} at most{each_one}",
                f"disk          {_size(self.disk_bytes)} in --out",
                f"measured on   {counted(self.sample, 'record')} spread over the input, "
                f"{self.noisy:.0%} of them answered again; nothing was written",
            )
        )

    def _time(self, share: float) -> str:
        """How long a share of the records takes, in words."""
        most, least = share * self.hours, share * self.least_hours
        return f"{_duration(least)} to {_duration(most)}" if least < 0.9 * most else _duration(most)


def _duration(hours: float) -> str:
    if hours < 1 / 30:
        return f"{hours * 3600:.0f} seconds"
    return f"{hours * 60:.0f} minutes" if hours < 2 else f"{hours:,.1f} hours"


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e8 else f"{size / 1e9:,.1f} GB"


def estimate(
    config: CleanConfig,
    sample: int = 64,
    *,
    shards: int = 1,
    engine: Engine | None = None,
    embedder: TextEmbedder | None = None,
) -> CostEstimate:
    """Clean `sample` records spread evenly over the input in a folder that is thrown away.

    `shards`: how many the run will be cut into. Raises UserError as `robustft.clean` does.
    """
    source = open_source(config)
    kinds = Counter(isinstance(item, Record) for item in watched(source, "count"))
    records, rejects = kinds[True], kinds[False]
    engine, embedder = load(config, engine, embedder)
    with tempfile.TemporaryDirectory(prefix="robustft-") as name:
        folder = Path(name)
        chosen = _spread(source, records, min(sample, records))
        path = folder / f"sample{source.suffix}"
        _copy(source, path, chosen)
        watch = Stopwatch()
        small = replace(
            config, input=str(path), out=folder / "out", limit=None, schema=source.schema,
            detector="paper", second_opinion=(), dataset_info=False, tuned=TunedConfig(),
        )  # fmt: skip
        with _unheard():  # warnings would be of the sample
            result = run_clean(small, engine=engine, embedder=embedder)
        seconds = watch.seconds()
        with Store(folder / "out" / "run.sqlite") as store:
            totals = store.totals()
        with Store(folder / "empty.sqlite"):
            pass
        fixed = (folder / "empty.sqlite").stat().st_size
        files = [path for path in (folder / "out").rglob("*") if path.is_file()]
        grows = [path for path in files if path.name not in ("report.html", "manifest.json")]
        disk = sum(path.stat().st_size for path in grows) - fixed
    share = records / len(chosen)
    noisy = result.counts["noisy"] / len(chosen)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Beside the models: noisy, selected, wrong, nll, evidence and opinions, and the index's codes.
    memory = records * (256 + embedder.dimensions)
    if config.learners:  # their copies of the embeddings, in float64
        memory += min(records, _LEARNT_AT_ONCE) * 12 * embedder.dimensions
    alike = config.learners and len(result.options) == 1
    pair = _seconds_a_pair(embedder.dimensions, config.threads) / 3600
    search = pair * _pairs(config, records, noisy, alike=alike)
    vote = pair * _pairs(config, records, 0.0, alike=alike)
    return CostEstimate(
        records=records,
        rejects=rejects,
        sample=len(chosen),
        noisy=noisy,
        prompt_tokens=round(share * sum(cost["prompt_tokens"] for cost in totals.values())),
        new_tokens=round(share * sum(cost["new_tokens"] for cost in totals.values())),
        hours=share * seconds / 3600 + search,
        least_hours=(
            share * (seconds - result.seconds["relabel"]) / 3600 + vote
            if config.votes
            else share * seconds / 3600 + search
        ),
        search_hours=search,
        memory_bytes=peak + memory,
        disk_bytes=round(share * disk),
        shards=shards,
    )


def _pairs(config: CleanConfig, records: int, noisy: float, *, alike: bool) -> float:
    """Pairs of records whose cosine exact search looks at; `alike`: all have the same options.

    Where the crowd settles labels, fewer: a noisy record then needs no neighbours.
    """
    pairs = float(records * min(records, VOTERS)) if alike else 0.0
    if "cer" not in config.without and config.retriever == "exact":
        pairs += noisy * records * records
    return pairs


def _seconds_a_pair(dimensions: int, threads: int | None) -> float:
    """Measured on rows drawn at random."""
    rows = np.random.default_rng(0).standard_normal((_TRIED, dimensions), np.float32)
    index = CosineKNN(rows, threads=threads)
    index.search(rows[:16], 3)  # the first call starts the threads
    watch = Stopwatch()
    index.search(rows[:_TRIED_AT_ONCE], 3)
    return watch.seconds() / (_TRIED * _TRIED_AT_ONCE)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    logger = logging.getLogger("robustft")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _spread(source: RecordSource, records: int, sample: int) -> list[Record]:
    """`sample` records at even distances."""
    wanted = {(2 * number + 1) * records // (2 * sample) for number in range(sample)}
    return [
        item
        for item in watched(source, "sample")
        if isinstance(item, Record) and item.index in wanted
    ]


def _copy(source: RecordSource, path: Path, chosen: Sequence[Record]) -> None:
    with atomic_file(path) as file:
        writer = source.reader.writer(file)
        for record in chosen:
            writer.write(record.row, {})
        writer.close()
