"""Writing a training set from one decision a record, for methods simpler than RobustFT."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import orjson

from robustft.answers import matches
from robustft.cleaning import open_source, refuse_runs, spare_folder
from robustft.config import CleanConfig
from robustft.engines import Engine
from robustft.exchange import exchange
from robustft.files import atomic_file
from robustft.next_steps import to_train_and_evaluate
from robustft.outputs import claim, command, identity, made_by, write_manifest
from robustft.overlap import asked
from robustft.progress import Progress
from robustft.records import (
    Record,
    RecordSource,
    RecordWriter,
    Reject,
    count_records,
    output_name,
)
from robustft.store import Stopwatch, folder_lock
from robustft.terminal import counted, plural_of
from robustft.verdicts import CleanResult

_CHUNK = 512
_Chunk = tuple[list[Record | Reject], list[Record]]  # of the input, and those of it read


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to train on, None to drop the record, and why."""

    answer: str | None
    reason: str
    failed: bool = False  # the engine gave no reply

    @classmethod
    def unanswered(cls, record: Record, failure: str) -> Decision:
        """A record that the engine said nothing about stays as given."""
        return cls(record.answer, f"not judged: no reply: {failure}", failed=True)


def write_decisions(
    config: CleanConfig,
    method: str,
    decide: Callable[[Sequence[Record], Callable[[float], None]], Sequence[Decision]],
    *,
    engine: Engine | None = None,
    quiet: bool = False,
) -> CleanResult:
    """Write `cleaned.*`, `verdicts.jsonl`, `rejects.jsonl` and `manifest.json` to `config.out`.

    `method` is its name; `decide` sees up to 512 records at a time, in input order, once it is
    certain that the folder may be written to, and what to call with the number of records done;
    `engine`: whom it asks; where that waits for a server it is called in several threads at a time.
    `quiet`: it shows itself how far it is.

    Raises:
        UserError: the input cannot be read, the folder not be written, or it is not this method's.
    """
    watch = Stopwatch()
    source = open_source(config)
    content_hash = source.content_hash
    whose = identity(config, method, content_hash)
    out = config.out
    result = CleanResult(out, out / output_name(source))
    with ExitStack() as stack:
        stack.enter_context(folder_lock(out))
        refuse_runs(out)
        spare_folder(config, source, own=made_by(out, method, content_hash))
        claim(out, whose)
        cleaned = stack.enter_context(RecordWriter(result.cleaned, source))
        verdicts = stack.enter_context(atomic_file(out / "verdicts.jsonl"))
        rejects = stack.enter_context(atomic_file(out / "rejects.jsonl"))
        total = None if quiet else count_records(source)
        shown = stack.enter_context(Progress(method, total, unit="records", quiet=quiet))

        def jobs() -> Iterator[tuple[_Chunk, Callable[[], Sequence[Decision]]]]:
            stream = iter(source)
            while items := list(itertools.islice(stream, _CHUNK)):
                records = [item for item in items if isinstance(item, Record)]
                yield (items, records), functools.partial(decide, records, shown.update)

        for (items, records), decisions in stack.enter_context(asked(engine, jobs())):
            for record, decision in zip(records, decisions, strict=True):
                action, decision = _settled(record, decision, source)
                result.counts[action] += 1
                result.unanswered += decision.failed
                if decision.answer is not None:
                    cleaned.write(record, record.answer if action == "keep" else decision.answer)
                line = {
                    "id": record.id,
                    **record.place.told,
                    "action": action,
                    "given": record.answer,
                    "answer": decision.answer,
                    "reason": decision.reason,
                }
                verdicts.write(orjson.dumps(line) + b"\n")
            for item in items:
                if isinstance(item, Reject):
                    result.counts["rejected"] += 1
                    rejects.write(orjson.dumps(item.told) + b"\n")
        source.require_unchanged()
    result.counts["input"] = sum(result.counts.values())
    if result.unanswered:
        result.warn(
            f"{counted(result.unanswered, 'record')} got no reply from the engine and "
            f"{plural_of(result.unanswered, 'stays', 'stay')} as given "
            "(verdicts.jsonl says why); the same command asks again"
        )
    result.seconds["total"] = round(watch.seconds(), 3)
    manifest = {
        **whose, "command": command(), "dataset_info": config.dataset_info,
        "counts": dict(result.counts),
        "unanswered": result.unanswered, "warnings": result.warnings, "seconds": result.seconds,
    }  # fmt: skip
    write_manifest(out, manifest)
    if result.left:
        result.next_steps = to_train_and_evaluate(result.cleaned, out, config.engine, config.schema)
    if config.dataset_info:
        exchange(source, result.cleaned, left=result.left)
    return result


def _settled(record: Record, decision: Decision, source: RecordSource) -> tuple[str, Decision]:
    """What becomes of a record: keep, relabel, or drop, also where the new answer has no place."""
    if decision.answer is None:
        return "drop", decision
    if matches(
        record.answer, decision.answer, kind=record.kind, options=record.options, threshold=1.0
    ):
        return "keep", decision
    refused = source.refusal(record.row, decision.answer)
    if refused is not None:
        return "drop", Decision(None, f"{decision.reason}; {refused}")
    return "relabel", decision
