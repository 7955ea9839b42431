"""Writing a training set from one decision a record, for methods simpler than RobustFT."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import orjson

from robustft.answers import answer_kind, matches
from robustft.cleaning import spare_folder
from robustft.config import CleanConfig
from robustft.errors import UserError
from robustft.files import atomic_file, write_atomically
from robustft.records import Record, RecordWriter, Reject, open_records, output_name
from robustft.store import Stopwatch, folder_lock
from robustft.verdicts import CleanResult

_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to train on, None to drop the record, and why."""

    answer: str | None
    reason: str


def write_decisions(
    config: CleanConfig, decide: Callable[[Sequence[Record]], Sequence[Decision]]
) -> CleanResult:
    """Write `cleaned.*`, `verdicts.jsonl`, `rejects.jsonl` and `manifest.json` to `config.out`.

    `decide` sees up to 512 records at a time, in input order.

    Raises:
        UserError: the input cannot be read, or the folder not be written.
    """
    watch = Stopwatch()
    source = open_records(
        config.input, schema=config.schema, limit=config.limit, split=config.split
    )
    out = config.out
    result = CleanResult(out, out / output_name(source))
    if result.cleaned.exists() and result.cleaned.resolve().samefile(config.input):
        raise UserError(f"{config.input}: would be overwritten; choose another --out")
    spare_folder(out, source, ".lock")
    with (
        folder_lock(out),
        RecordWriter(result.cleaned, source) as cleaned,
        atomic_file(out / "verdicts.jsonl") as verdicts,
        atomic_file(out / "rejects.jsonl") as rejects,
    ):
        stream = iter(source)
        while items := list(itertools.islice(stream, _CHUNK)):
            records = [item for item in items if isinstance(item, Record)]
            for record, decision in zip(records, decide(records), strict=True):
                action = _action(record, decision)
                result.counts[action] += 1
                if decision.answer is not None:
                    cleaned.write(record, record.answer if action == "keep" else decision.answer)
                line = {
                    "id": record.id,
                    "action": action,
                    "given": record.answer,
                    "answer": decision.answer,
                    "reason": decision.reason,
                }
                verdicts.write(orjson.dumps(line) + b"\n")
            for item in items:
                if isinstance(item, Reject):
                    result.counts["rejected"] += 1
                    rejects.write(orjson.dumps({"line": item.line, "reason": item.reason}) + b"\n")
    result.counts["input"] = sum(result.counts.values())
    result.seconds["total"] = round(watch.seconds(), 3)
    manifest = {
        "command": sys.argv, "config": config.fingerprint(), "counts": dict(result.counts),
        "input": {"path": config.input, "blake2b": source.content_hash},
        "seconds": result.seconds,
    }  # fmt: skip
    write_atomically(
        out / "manifest.json", orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n"
    )
    return result


def _action(record: Record, decision: Decision) -> str:
    if decision.answer is None:
        return "drop"
    kind = answer_kind(record.answer, record.options)
    same = matches(record.answer, decision.answer, kind=kind, options=record.options)
    return "keep" if same else "relabel"
