"""Generation in the pipeline beside its peers, in records a second; `robustft bench pipeline`.

A record is what the reasoning expert is asked first: one prompt of the bundled corpus, answered
with up to `TOKENS` tokens and their log-probabilities. The reference way is that of the method's
published code: one `generate` a prompt, all scores kept, log-probabilities from them afterwards;
as its prompts are run one by one, a third of them gives its rate.
vLLM runs in an interpreter of its own (`--vllm-python`), as its requirements seldom fit another
environment.

All run the embedded default model in float32, where the order of summation does not change which
token is likeliest. `correct` is the share of the reference's texts that a contender gives, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from robustft.benchmarks.measure import (
    Row,
    append_rows,
    cpu_name,
    require_rows_file,
    table,
    versions,
)
from robustft.config import EngineConfig
from robustft.engines import Failure, Generation
from robustft.engines.transformers import TransformersEngine
from robustft.errors import UserError
from robustft.models import find_model
from robustft.prompts import reasoning_prompt
from robustft.provenance import commit
from robustft.records import Record, open_records

TOKENS = 48
_LEAST_ALIKE = 0.95
_REFERENCE = 24  # records that the reference way is timed on
_PEER = Path(__file__).with_name("vllm_peer.py")
_CORPUS = Path(__file__).parent.parent / "data" / "demo.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; status 1 where the engine's texts are not the reference's."""
    parser = argparse.ArgumentParser(prog="robustft bench pipeline", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer records")
    parser.add_argument("--out", type=Path, help="append CSV rows to this file")
    parser.add_argument("--vllm-python", help="an interpreter that has vLLM (default: left out)")
    options = parser.parse_args(arguments)
    require_rows_file(options.out)
    source = open_records(str(_CORPUS))
    records = [item for item in source if isinstance(item, Record)]
    records = records[:_REFERENCE] if options.quick else records
    prompts = [reasoning_prompt(record, ()) for record in records]
    engine = TransformersEngine(EngineConfig(dtype="float32", device="cpu"))

    def ask() -> list[Generation]:
        found: dict[int, Generation | Failure] = {}
        for batch in engine.plan(prompts, TOKENS):
            replies = engine.generate([prompts[row] for row in batch], TOKENS)
            found.update(zip(batch, replies, strict=True))
        return [one for _, one in sorted(found.items()) if isinstance(one, Generation)]

    engine.generate(prompts[:2], 2)  # warm
    encoded = engine.encoder.encode(prompts)
    texts, each = _reference(engine, encoded[:_REFERENCE])
    runs = []
    for _ in range(3):
        begin = time.perf_counter()
        replies = ask()
        runs.append(time.perf_counter() - begin)
    rows = [
        _row("reference: one generate a prompt", each, len(texts), 1.0),
        _row("robustft transformers", runs, len(records), _alike(texts, [r.text for r in replies])),
    ]
    if options.vllm_python:
        said, took = _vllm(options.vllm_python, encoded, sorted(engine.encoder.ends))
        decoded = [engine.encoder.decode(tokens)[0] for tokens in said]
        rows.append(_row("vLLM offline", took, len(records), _alike(texts, decoded)))
    print(table(rows))
    rate = rows[1].rate
    print(f"robustft against the reference way: {rate / rows[0].rate:.2f}x")
    if len(rows) > 2:
        print(f"vLLM against robustft: {rows[2].rate / rate:.2f}x")
    if options.out:
        append_rows(options.out, rows)
    return int(float(rows[1].correct) < _LEAST_ALIKE)


def _reference(
    engine: TransformersEngine, encoded: Sequence[Sequence[int]]
) -> tuple[list[str], list[float]]:
    """Texts, and the seconds of the whole as one run, prompt by prompt."""
    texts = []
    begin = time.perf_counter()
    for ids in encoded:
        inputs = torch.tensor([list(ids)])
        with torch.inference_mode():
            output: Any = engine.model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=TOKENS,
                do_sample=False, output_scores=True, return_dict_in_generate=True,
                pad_token_id=engine.tokenizer.eos_token_id,
            )  # fmt: skip
            scores = torch.stack(output.scores, dim=1).float().log_softmax(dim=-1)
            tokens = output.sequences[0, inputs.shape[1] :]
            scores[0].gather(1, tokens[:, None]).mean().item()  # eq. 7
        reply = [token for token in tokens.tolist() if token not in engine.encoder.ends]
        texts.append(engine.encoder.decode(reply)[0])
    return texts, [time.perf_counter() - begin]


def _vllm(
    python: str, encoded: Sequence[Sequence[int]], ends: Sequence[int]
) -> tuple[list[list[int]], list[float]]:
    """Token ids that vLLM wrote, and the seconds of each run."""
    asked = {
        "model": find_model(None).path, "prompts": [list(ids) for ids in encoded],
        "tokens": TOKENS, "ends": list(ends), "dtype": "float32",
    }  # fmt: skip
    try:
        done = subprocess.run(
            [python, str(_PEER)],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines() or [""]
        raise UserError(f"--vllm-python {python}: vLLM did not run: {said[-1]}") from error
    return found["replies"], found["seconds"]


def _alike(texts: Sequence[str], others: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(texts, others, strict=False)) / len(texts)


def _row(contender: str, seconds: Sequence[float], records: int, alike: float) -> Row:
    ordered = sorted(seconds)
    p20, p50, p80 = (ordered[round(share * (len(ordered) - 1))] * 1e3 for share in (0.2, 0.5, 0.8))
    return Row(
        benchmark="pipeline", case=f"{records} records, {TOKENS} tokens each", contender=contender,
        threads=torch.get_num_threads(), ms_p20=p20, ms_p50=p50, ms_p80=p80,
        rate=records / p50 * 1e3, unit="records/s", correct=f"{alike:.3f}", device=cpu_name(),
        versions=versions(("torch", "transformers", "robustft")), commit=commit(),
    )  # fmt: skip
