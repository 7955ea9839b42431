"""`robustft score` beside the plain way: the model's logits for every position, then log_softmax.

Both score the same responses in the same batches with the same loaded model; the plain way computes
the nll alone, in the logits' own dtype.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from robustft.benchmarks.measure import (
    Row,
    append_rows,
    require_rows_file,
    rows_of,
    table,
    timed_together,
)
from robustft.config import EngineConfig
from robustft.engines import Failure, Prompt, TokenValues
from robustft.engines.transformers import TransformersEngine
from robustft.records import Record, open_records
from robustft.scoring import response_request

OURS = "robustft score"
PLAIN = "model(...).logits and log_softmax"


class PlainEngine(TransformersEngine):
    """The same batches, scored as a first attempt would."""

    def _nll(self, encoded: Sequence[list[int]], endings: Sequence[list[int]]) -> list[TokenValues]:
        inputs = self._left_padded(
            [[*head, *tail] for head, tail in zip(encoded, endings, strict=True)]
        )
        logits = self.model(**inputs, use_cache=False).logits
        logprobs = torch.log_softmax(logits, -1)
        width = logits.shape[1]
        found = []
        for row, tail in enumerate(endings):
            ids = torch.tensor(tail, device=logits.device)
            part = logprobs[row, width - len(tail) - 1 : width - 1]
            nll = -part.gather(-1, ids[:, None])[:, 0].float().cpu().numpy()
            found.append(TokenValues(nll, nll, nll, nll))
        return found


def score_all(engine: TransformersEngine, prompts: list[Prompt], texts: list[str]) -> list[float]:
    """Mean nll of every response, batch by batch as `robustft score` goes."""
    nll = [0.0] * len(prompts)
    for rows in engine.plan(prompts, 16):
        found = engine.score([prompts[row] for row in rows], [texts[row] for row in rows])
        for row, one in zip(rows, found, strict=True):
            nll[row] = math.nan if isinstance(one, Failure) else one.nll
    return nll


def run(path: str, limit: int, model: str | None, rounds: int) -> list[Row]:
    """Both contenders on the first `limit` records of a file."""
    engine = TransformersEngine(EngineConfig(model=model))
    plain = PlainEngine(
        EngineConfig(model=engine.model_id), model=engine.model, tokenizer=engine.tokenizer
    )
    found = open_records(path, limit=limit)
    records = [record for record in found if isinstance(record, Record)]
    prompts, texts = (list(part) for part in zip(*map(response_request, records), strict=True))
    tokens = sum(map(len, engine.encoder.encode(prompts)))
    tokens += sum(
        len(engine.encoder.continuation(prompt.prefix, text))
        for prompt, text in zip(prompts, texts, strict=True)
    )
    calls = {
        OURS: lambda: score_all(engine, prompts, texts),
        PLAIN: lambda: score_all(plain, prompts, texts),
    }
    difference = np.abs(np.subtract(calls[OURS](), calls[PLAIN]())).max()
    # In 16 bits either way is up to about 0.1 nats away from float32, in its own direction.
    coarse = engine.model.dtype != torch.float32
    gate = "yes" if difference < (0.2 if coarse else 1e-3) else "NO"
    timings = timed_together(calls, device="cpu", repeats=rounds, budget=60.0)
    return rows_of(
        "score",
        f"{Path(path).name} {len(records)} records {engine.model_id} {engine.model.dtype}",
        calls,
        timings,
        rate=lambda ms: tokens / ms * 1e3,
        unit="tokens/s",
        correct=dict.fromkeys(calls, gate),
        device=engine.device.type,
        packages=("robustft", "torch", "transformers"),
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table, append it to --out; status 1 when the two disagree."""
    from robustft.cli.clean import demo_corpus

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer records")
    parser.add_argument("--out", type=Path, help="append CSV rows to this file")
    parser.add_argument("--data", help="records to score (default: the bundled corpus)")
    parser.add_argument("--model", help="as for robustft score (default: the embedded one)")
    options = parser.parse_args(arguments)
    require_rows_file(options.out)
    path = options.data or str(demo_corpus())
    rows = run(path, 16 if options.quick else 64, options.model, rounds=3)
    print(table(rows))
    ours, plain = rows
    print(f"{plain.ms_p50 / ours.ms_p50:.2f}x the tokens/s of {PLAIN}")
    if ours.extra_mib is not None and plain.extra_mib:
        print(f"{ours.extra_mib / plain.extra_mib:.0%} of its memory beyond the model")
    if options.out:
        append_rows(options.out, rows)
    return int(ours.correct == "NO")
