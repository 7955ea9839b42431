"""`score`: token statistics of every given response, teacher-forced, nothing generated."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

import orjson

from robustft import prompts
from robustft.config import EngineConfig
from robustft.engines import Engine, Failure, Prompt
from robustft.engines.factory import load_engine
from robustft.errors import UserError
from robustft.experts import record_kind
from robustft.files import atomic_file
from robustft.progress import Progress
from robustft.records import Record, Reject, open_records
from robustft.store import Stopwatch

_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """What `score` did; `str()` is its closing summary."""

    path: Path
    records: int
    rejects: int
    tokens: int
    seconds: float
    mean_nll: float  # over records, nats per token
    failures: int = 0  # requests that the engine did not answer

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        failed = f", {self.failures} not answered by the engine" if self.failures else ""
        return (
            f"{self.records} responses scored, {self.rejects} unreadable lines{failed}\n"
            f"mean nll    {self.mean_nll:.4f} nats a token (mean over responses)\n"
            f"took        {self.seconds:.1f} s, {self.tokens} response tokens ({rate:.0f}/s)\n"
            f"statistics  {self.path}"
        )


def response_request(record: Record) -> tuple[Prompt, str]:
    """The prompt of a record and its given response as the model would have to write it."""
    prompt = prompts.answer_prompt(record, record_kind(record))
    return prompt, (f" {record.answer}" if prompt.prefix else record.answer)


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
    line becomes `{"line": …, "rejected": reason}`. The file appears when it is whole.
    """
    source = open_records(path, schema=schema, limit=limit, split=split)
    if out.exists() and Path(path).exists() and out.samefile(path):
        raise UserError(f"{out}: is the input itself; choose another name")
    total = sum(1 for item in source if isinstance(item, Record))
    engine = engine or load_engine(config)
    if not engine.abilities.score:
        why = "; ".join(engine.abilities.found)
        raise UserError(
            f"{config.base_url}: this server cannot score given text ({why}); use one that can, "
            "such as vLLM, with --tokenizer, or --engine transformers"
        )
    watch = Stopwatch()
    tokens = rejects = failures = 0
    nll = 0.0
    with atomic_file(out) as handle, Progress("score", total, unit="records") as progress:
        stream = iter(source)
        while items := list(itertools.islice(stream, _CHUNK)):
            records = [item for item in items if isinstance(item, Record)]
            requests = [response_request(record) for record in records]
            scores = {}
            for rows in engine.plan([prompt for prompt, _ in requests], 16):
                found = engine.score(
                    [requests[row][0] for row in rows], [requests[row][1] for row in rows]
                )
                scores.update(
                    {records[row].index: one for row, one in zip(rows, found, strict=True)}
                )
                progress.update(len(rows))
            for item in items:
                if isinstance(item, Reject):
                    rejects += 1
                    body: dict[str, object] = {"line": item.line, "rejected": item.reason}
                else:
                    score = scores[item.index]
                    if isinstance(score, Failure):
                        failures += 1
                        handle.write(orjson.dumps({"id": item.id, "failed": score.reason}) + b"\n")
                        continue
                    tokens += score.tokens
                    nll += score.nll if score.tokens else 0.0
                    body = {"id": item.id} | dataclasses.asdict(score)
                handle.write(orjson.dumps(body) + b"\n")
    scored = total - failures
    mean = nll / scored if scored else float("nan")
    return ScoreSummary(out, scored, rejects, tokens, watch.seconds(), mean, failures)
