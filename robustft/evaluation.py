"""Accuracy of a model, with or without an adapter, on a file whose answers are trusted."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from robustft.config import EvalConfig
from robustft.engines import Engine
from robustft.engines.encoding import cuts_told
from robustft.engines.factory import load_engine
from robustft.files import spare
from robustft.metrics import Tally, macro_f1
from robustft.predictions import (
    Ask,
    Judge,
    Prediction,
    accepted_answers,
    as_line,
    ask_plainly,
    category_of,
    from_line,
    judge,
    predict,
)
from robustft.progress import Progress
from robustft.records import Record, RecordSource, Reject, count_records, leave_out, open_records
from robustft.records.formats import BadRowError, hash_files
from robustft.records.sources import require_lines_name
from robustft.resumable import ResumableLines, answer_in_units, spare_other_lines
from robustft.terminal import counted, plural_of, printable
from robustft.wording import wording

_log = logging.getLogger("robustft")
_MOST_CATEGORIES = 1000
_SHOWN = 60  # categories in the summary; the predictions file has all of them


@dataclass(slots=True)
class EvalResult:
    """What `evaluate` found. `macro_f1` and `majority` exist where all records share options."""

    model: str
    adapter: str | None
    overall: Tally = field(default_factory=Tally)
    categories: dict[str, Tally] = field(default_factory=dict)
    macro_f1: float | None = None
    majority: float | None = None  # accuracy of always giving the commonest answer
    credit: float = 0.0  # sum of the scores: above the right answers where a metric gives parts
    unanswered: int = 0
    failed: int = 0  # the engine gave no reply: left out
    rejected: int = 0
    truncated: int = 0  # prompts of this session that lost their middle: too long for the window
    seconds: float = 0.0
    out: Path | None = None  # where the predictions were written

    @property
    def f1(self) -> float:
        """Mean score in [0, 1]: F1 by a metric that has one (DROP's), else the accuracy."""
        return self.credit / self.overall.total if self.overall.total else math.nan

    def __str__(self) -> str:
        """The closing summary of the command line."""
        low, high = self.overall.interval
        who = self.model if self.adapter is None else f"{self.model} with {self.adapter}"
        found = "no question was answered"
        if self.overall.total:
            found = (
                f"accuracy {self.overall.accuracy:.1%} ({self.overall.correct:,} of "
                f"{self.overall.total:,}; 95% interval {100 * low:.1f} to {100 * high:.1f})"
            )
        lines = [f"{who}: {found}, {self.seconds:,.0f} s"]
        if self.macro_f1 is not None and self.majority is not None:
            lines.append(
                f"macro-F1 {self.macro_f1:.1%}; always the commonest answer: accuracy "
                f"{self.majority:.1%}"
            )
        if self.credit > self.overall.correct:
            lines.append(
                f"mean F1 {self.f1:.1%}, in which a part of an answer counts for its share"
            )
        if self.unanswered:
            replies = counted(self.unanswered, "reply", "replies")
            count = plural_of(self.unanswered, "counts", "count")
            lines.append(f"{replies} held no readable answer and {count} as wrong.")
        if self.failed:
            lines.append(
                f"{counted(self.failed, 'question')} got no reply from the engine and "
                f"{plural_of(self.failed, 'was', 'were')} left out."
            )
        if self.rejected:
            were = plural_of(self.rejected, "was", "were")
            lines.append(
                f"{counted(self.rejected, 'record')} could not be read and {were} left out."
            )
        if self.truncated:
            lines.append(f"{cuts_told(self.truncated)}.")
        largest = sorted(self.categories.items(), key=lambda one: (-one[1].total, one[0]))
        for name, tally in sorted(largest[:_SHOWN]):
            low, high = tally.interval
            lines.append(
                f"  {printable(name)}: {tally.accuracy:.1%} ({tally.correct:,} of {tally.total:,}; "
                f"{100 * low:.1f} to {100 * high:.1f})"
            )
        if more := len(largest[_SHOWN:]):
            lines.append(f"  and {counted(more, 'category', 'categories')} of no more records")
        if self.out is not None:
            lines.append(f"predictions  {self.out}")
        return "\n".join(lines)


def evaluate(
    config: EvalConfig,
    *,
    engine: Engine | None = None,
    ask: Ask = ask_plainly,
    judge: Judge = judge,
) -> EvalResult:
    """Ask the model every question of `config.input` and compare with the file's answers.

    Multiple choice is read from the options' likelihoods after "Answer:" (where the engine tells
    them), other answers from generated text. With `config.out`, predictions are written there,
    one JSON line a record; killed before that, the same call goes on where it was.
    `engine` is used instead of loading `config.engine` and `config.adapter`; `ask` words the
    prompts of some records, `judge` reads and scores a reply to an open question, both in any
    thread where the engine waits for a server.

    Raises:
        UserError: the input, the model or the adapter cannot be read, or `out` not written.
    """
    source = open_records(
        config.input, schema=config.schema, limit=config.limit, split=config.split
    )
    if config.out is not None:
        require_lines_name(config.out)
        spare(config.out, config.input)
        spare_other_lines(config.out, ("predicted",))
    total = count_records(source)
    started = time.monotonic()
    engine = engine or load_engine(config.engine, config.adapter)
    result = EvalResult(engine.model_id, None if config.adapter is None else str(config.adapter))
    scores = _Scores(result)
    truncated = engine.truncated
    with _output(config, engine, source) as out, Progress("eval", total, unit="records") as shown:

        def answer(records: Sequence[Record]) -> list[Prediction]:
            limit = config.answer_tokens
            return predict(records, ask(records), engine, limit, judge, shown.update)

        with answer_in_units(
            _records(source, result), engine, out, ask=answer, write=as_line, read=_unless_failed
        ) as answered:
            for prediction, known in answered:
                scores.add(prediction)
                if known:
                    shown.skip(1)
    scores.finish()
    result.truncated = engine.truncated - truncated
    result.seconds = time.monotonic() - started
    result.out = config.out
    return result


def _output(
    config: EvalConfig, engine: Engine, source: RecordSource
) -> contextlib.AbstractContextManager[ResumableLines | None]:
    """The predictions file, where one is wanted."""
    if config.out is None:
        return contextlib.nullcontext()
    adapter: Path | None = config.adapter
    files = [] if adapter is None else sorted(adapter.glob("adapter_*"))  # weights and settings
    identity = config.fingerprint() | {
        "input": source.content_hash, "adapter": hash_files(files),
        "model": engine.model_id, "revision": engine.revision, "wording": wording(engine),
    }  # fmt: skip
    return ResumableLines(config.out, identity)


def _records(source: RecordSource, result: EvalResult) -> Iterator[Record]:
    """The records that can be read."""
    for item in map(_checked, source):
        if isinstance(item, Reject):
            result.rejected = leave_out(item, source, result.rejected)
        else:
            yield item


def _checked(item: Record | Reject) -> Record | Reject:
    """A reject in place of a record whose category or further answers cannot be decoded.

    They are fields of no schema: opening the input has not read them.
    """
    if isinstance(item, Record):
        try:
            category_of(item.row)
            accepted_answers(item)
        except BadRowError as error:
            return Reject(item.line, str(error), b"", 0, item.file)
    return item


class _Scores:
    """Adds predictions up into an `EvalResult`."""

    def __init__(self, result: EvalResult) -> None:
        self._result = result
        self._options: tuple[str, ...] | None = None
        self._fixed = True  # all records so far share their options
        self._categorised = True  # there are not too many categories so far
        self._pairs: Counter[tuple[str, str | None]] = Counter()  # (expected, predicted)

    def add(self, prediction: Prediction) -> None:
        result, record = self._result, prediction.record
        if prediction.failure:
            if not result.failed:
                _log.warning(
                    "record %s: %s; left out, as are others without a reply",
                    printable(record.id), printable(prediction.failure),
                )  # fmt: skip
            result.failed += 1
            return
        result.overall.add(prediction.correct)
        result.unanswered += prediction.answer is None
        scored = prediction.score
        result.credit += float(prediction.correct) if scored is None else scored
        if prediction.category is not None and self._categorised:
            result.categories.setdefault(prediction.category, Tally()).add(prediction.correct)
            if len(result.categories) > _MOST_CATEGORIES:  # as good as one a record: none
                self._categorised = False
                result.categories.clear()
        if self._options is None:
            self._options = record.options
        self._fixed = self._fixed and record.options is not None
        self._fixed = self._fixed and record.options == self._options
        if self._fixed:
            predicted = record.answer if prediction.correct else prediction.answer
            self._pairs[record.answer, predicted] += 1

    def finish(self) -> None:
        result = self._result
        if self._fixed and self._pairs:
            result.macro_f1 = macro_f1(self._pairs)
            expected: Counter[str] = Counter()
            for (answer, _), number in self._pairs.items():
                expected[answer] += number
            result.majority = max(expected.values()) / result.overall.total


def _unless_failed(record: Record, line: bytes) -> Prediction | None:
    """What an earlier session found; None where it had got no reply."""
    found = from_line(record, line)
    return None if found.failure else found
