"""`score`: token statistics of every given response, teacher-forced, nothing generated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from robustft import prompts
from robustft.config import EngineConfig
from robustft.engines import Engine, Failure, Prompt, ResponseScore
from robustft.engines.factory import load_engine
from robustft.errors import UserError
from robustft.files import spare
from robustft.progress import Progress
from robustft.records import Record, Reject, count_records, open_records
from robustft.records.sources import require_lines_name
from robustft.resumable import ResumableLines, answer_in_units, spare_other_lines
from robustft.store import Stopwatch
from robustft.terminal import counted, printable
from robustft.wording import wording

_Line = dict[str, Any]  # of the output: an item's statistics, or why it has none
_STATISTICS = tuple(one.name for one in dataclasses.fields(ResponseScore))
_NAMED = 5  # truncated records that the summary names


@dataclass(slots=True)
class ScoreSummary:
    """What `score` did; `str()` is its closing summary."""

    path: Path
    records: int = 0  # scored
    rejects: int = 0
    failures: int = 0  # requests that the engine did not answer
    truncated: int = 0  # of those scored: longer than the model's window
    truncated_ids: list[str] = field(default_factory=list)  # of the first of them
    tokens: int = 0
    total_nll: float = 0.0  # of all records, each in nats per token
    resumed: int = 0  # tokens that an earlier session had scored
    seconds: float = 0.0  # of this session

    @property
    def mean_nll(self) -> float:
        """Mean over records, nats per token; NaN without any."""
        return self.total_nll / self.records if self.records else float("nan")

    def add(self, line: _Line, *, resumed: bool) -> None:
        """Add a line of the output up."""
        if "rejected" in line:
            self.rejects += 1
        elif "failed" in line:
            self.failures += 1
        else:
            self.records += 1
            if line.get("truncated"):
                self.truncated += 1
                if self.truncated <= _NAMED:
                    self.truncated_ids.append(line["id"])
            self.tokens += line["tokens"]
            self.total_nll += line["nll"] if line["tokens"] else 0.0
            self.resumed += line["tokens"] if resumed else 0

    def __str__(self) -> str:
        fresh = self.tokens - self.resumed
        # Of few tokens it would be the speed of starting.
        rate = f" ({fresh / self.seconds:.0f}/s)" if fresh >= 1000 and self.seconds else ""
        failed = f", {self.failures} not answered by the engine" if self.failures else ""
        before = f"; {self.resumed} more in an earlier session" if self.resumed else ""
        cut = ""
        if self.truncated:
            more = ", …" if self.truncated > _NAMED else ""
            cut = (
                f"truncated   {self.truncated:,} did not fit the model's window: the question lost "
                "its middle, or the response its end: "
                f"{', '.join(map(printable, self.truncated_ids))}{more}\n"
            )
        mean = ""
        if self.records:
            mean = f"mean nll    {self.mean_nll:.4f} nats a token (mean over responses)\n"
        return (
            f"{counted(self.records, 'response')} scored, "
            f"{counted(self.rejects, 'unreadable record')}{failed}\n{cut}{mean}"
            f"took        {self.seconds:.1f} s, {counted(fresh, 'response token')}{rate}{before}\n"
            f"statistics  {self.path}"
        )


def response_request(record: Record) -> tuple[Prompt, str]:
    """The prompt of a record and its given response as the model would have to write it."""
    prompt = prompts.answer_prompt(record)
    return prompt, prompts.response(prompt, record.answer)


def score_file(
    path: str,
    out: Path,
    config: EngineConfig,
    *,
    schema: str | None = None,
    limit: int | None = None,
    split: str = "train",
    engine: Engine | None = None,
) -> ScoreSummary:
    """Score every record of a file; one JSON line each, in input order.

    Lines hold `id` and the fields of `robustft.engines.ResponseScore` (nats); an unreadable input
    line becomes `{"line": …, "rejected": reason}`, with its `file` where there are several. The
    file appears when it is whole; killed before that, the same call goes on where it was. Raises
    UserError where the input cannot be read, `out` not be written, or the engine cannot score.
    """
    source = open_records(path, schema=schema, limit=limit, split=split)
    require_lines_name(out)
    spare(out, path)
    spare_other_lines(out, ("nll", "rejected"))
    total = count_records(source)
    engine = engine or load_engine(config)
    if not engine.abilities.score:
        why = "; ".join(engine.abilities.found)
        raise UserError(
            f"{config.base_url}: this server cannot score given text ({why}); use one that can, "
            "such as vLLM, with --tokenizer, or --engine transformers"
        )
    identity = config.fingerprint() | {
        "input": source.content_hash, "schema": schema, "split": split, "limit": limit,
        "model": engine.model_id, "revision": engine.revision, "wording": wording(engine),
    }  # fmt: skip
    summary = ScoreSummary(out)
    watch = Stopwatch()
    with ResumableLines(out, identity) as lines, Progress("score", total, unit="records") as shown:
        ask = functools.partial(_scored, engine=engine, progress=shown.update)
        with answer_in_units(
            source, engine, lines, ask=ask, write=_written, read=_unless_failed
        ) as answered:
            for line, known in answered:
                summary.add(line, resumed=known)
                if known and "rejected" not in line:
                    shown.skip(1)
    summary.seconds = watch.seconds()
    return summary


def _written(line: _Line) -> bytes:
    return orjson.dumps(line) + b"\n"


def _unless_failed(item: Record | Reject, written: bytes) -> _Line | None:
    """A line that an earlier session wrote; None where its request had failed."""
    line: _Line = orjson.loads(written)
    return None if "failed" in line else line


def _scored(
    items: Sequence[Record | Reject], engine: Engine, progress: Callable[[int], None]
) -> list[_Line]:
    """The line of each item."""
    records = [item for item in items if isinstance(item, Record)]
    requests = [response_request(record) for record in records]
    lines: list[_Line] = [{}] * len(records)
    for rows in engine.plan([prompt for prompt, _ in requests], 16):
        scores = engine.score(
            [requests[row][0] for row in rows], [requests[row][1] for row in rows]
        )
        for row, score in zip(rows, scores, strict=True):
            said = (
                {"failed": score.reason}
                if isinstance(score, Failure)
                else {name: getattr(score, name) for name in _STATISTICS}
            )
            lines[row] = {"id": records[row].id, **said}
        progress(len(rows))
    read = iter(lines)
    return [
        next(read) if isinstance(item, Record) else {**item.place.told, "rejected": item.reason}
        for item in items
    ]
