"""Answer consistency beside rapidfuzz, rouge-score and torchmetrics, in pairs of answers a second.

Each case is N questions of K answers of L tokens: a random answer per question, the others copies
with 30 % of the tokens replaced. A pair counts once, (a, b) and (b, a) together. rapidfuzz gets the
answers as strings of code points, remapped per question before the clock starts.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustft.benchmarks.measure import (
    Row,
    Timing,
    append_rows,
    cpu_name,
    require_rows_file,
    table,
    timed,
    versions,
)
from robustft.provenance import commit

_VOCABULARY = 32_000
_PEERS = ("rapidfuzz", "rouge_score", "torchmetrics")
_PACKAGES = ("robustft", "numpy", "torch", "triton", "rapidfuzz", "rouge-score", "torchmetrics")

Ids = NDArray[np.int32]


def make_answers(questions: int, slots: int, width: int, seed: int = 0) -> Ids:
    """[N, K, L] token ids: per question one random answer and edited copies of it."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, _VOCABULARY, (questions, slots, width), dtype=np.int32)
    return np.where(rng.random(ids.shape) < 0.7, ids[:, :1], ids)


def _as_strings(ids: Ids) -> list[list[str]]:
    """Ids of each question as code points from U+0100 on, one string an answer."""
    strings = []
    for question in ids:
        _, ranks = np.unique(question, return_inverse=True)
        rows = ranks.reshape(question.shape) + 0x100
        strings.append(["".join(map(chr, row)) for row in rows.tolist()])
    return strings


def _rapidfuzz(ids: Ids, metric: str, threads: int) -> Callable[[], list[Any]]:
    from rapidfuzz import process
    from rapidfuzz.distance import Indel, Levenshtein

    scorer = {"lcs": Indel, "edit": Levenshtein}[metric].normalized_similarity
    strings = _as_strings(ids)
    return lambda: [process.cdist(row, row, scorer=scorer, workers=threads) for row in strings]


def _rouge_score(ids: Ids) -> Callable[[], list[Any]]:
    from rouge_score.rouge_scorer import RougeScorer

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return text.split()

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    texts = [[" ".join(map(str, row)) for row in question] for question in ids.tolist()]

    def run() -> list[Any]:
        return [
            [scorer.score(a, b)["rougeL"].fmeasure for a, b in itertools.combinations(row, 2)]
            for row in texts
        ]

    return run


def _torchmetrics(ids: Ids) -> Callable[[], list[Any]]:
    from torchmetrics.functional.text import edit_distance

    texts = _as_strings(ids)

    def run() -> list[Any]:
        return [
            [edit_distance(a, b, reduction="sum") for a, b in itertools.combinations(row, 2)]
            for row in texts
        ]

    return run


def _checked(questions: int) -> list[int]:
    """The questions, from the first to the last, that the gate looks at."""
    return sorted({int(place) for place in np.linspace(0, questions - 1, 4)})


def _gate(agreement: NDArray[np.float32], ids: Ids, metric: str) -> str:
    """Compare that of the checked questions with rapidfuzz (lcs, edit) or plain Python."""
    from robustft_kernels.answer_consistency_reference import pair_agreement

    few = ids[_checked(len(ids))]
    if metric in ("lcs", "edit") and importlib.util.find_spec("rapidfuzz"):
        expected = np.stack(_rapidfuzz(few, metric, 1)())
    else:
        rows = few.tolist()
        expected = np.array([[[pair_agreement(a, b, metric) for b in q] for a in q] for q in rows])
    return "yes" if np.allclose(agreement, expected, rtol=0, atol=1e-6) else "NO"


def _ours(ids: Ids, metric: str, threads: int) -> tuple[Callable[[], Any], str]:
    from robustft import _core

    questions, slots, width = ids.shape
    flat = ids.reshape(-1)
    start = (np.arange(questions * slots, dtype=np.int64) * width).reshape(questions, slots)
    length = np.full((questions, slots), width, dtype=np.int64)

    def run() -> NDArray[np.float32]:
        return _core.consistency_pairwise(flat, start, length, metric, threads)

    return run, _gate(run()[_checked(len(ids))], ids, metric)


def _whole(ids: Ids, metric: str, threads: int) -> tuple[Callable[[], Any], str]:
    from robustft_kernels import answer_consistency

    def run() -> NDArray[np.float32]:
        return answer_consistency(ids, metric=metric, threads=threads).agreement  # type: ignore

    return run, _gate(run()[_checked(len(ids))], ids, metric)


def _contenders(ids: Ids, metric: str) -> Iterator[tuple[str, int, int, Callable[[], Any], str]]:
    """(name, threads, questions, call, gate); slow peers get fewer questions."""
    for threads in (1, 2):
        yield "robustft pairwise", threads, len(ids), *_ours(ids, metric, threads)
    yield "robustft answer_consistency", 1, len(ids), *_whole(ids, metric, 1)
    some, few = ids[: max(1, len(ids) // 10)], ids[:1]
    if metric in ("lcs", "edit") and importlib.util.find_spec("rapidfuzz"):
        for threads in (1, 2):
            yield "rapidfuzz cdist", threads, len(some), _rapidfuzz(some, metric, threads), "-"
    if metric == "lcs" and importlib.util.find_spec("rouge_score"):
        yield "rouge-score", 1, len(few), _rouge_score(few), "-"
    if metric == "edit" and importlib.util.find_spec("torchmetrics"):
        yield "torchmetrics", 1, len(few), _torchmetrics(few), "-"


def _on_gpu(questions: int, slots: int, width: int, metric: str) -> tuple[Timing, str] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    from robustft_kernels import answer_consistency_triton as kernels

    ids = make_answers(questions, slots, width)
    flat = torch.from_numpy(ids.reshape(-1)).cuda()
    count = questions * slots
    start = (torch.arange(count, device="cuda") * width).reshape(questions, slots)
    length = torch.full_like(start, width)

    def run() -> Any:
        result = kernels.pairwise(flat, start, length, metric)
        torch.cuda.synchronize()
        return result

    gate = _gate(run()[_checked(questions)].cpu().numpy(), ids, metric)
    return timed(run, repeats=20), gate


def run(quick: bool) -> list[Row]:
    """All rows of this machine."""
    rows: list[Row] = []
    common = {"versions": versions(_PACKAGES), "commit": commit()}
    cases = [(300, 16, 64)] if quick else [(2_000, 16, 64), (4_000, 5, 32), (200, 64, 64)]
    if not quick:
        cases.append((200, 16, 512))
    for questions, slots, width in cases:
        ids = make_answers(questions, slots, width)
        for metric in ("lcs", "edit", "token_f1", "exact"):
            case = f"{metric} K={slots} L={width}"
            for name, threads, count, call, gate in _contenders(ids, metric):
                timing = timed(call, repeats=20, budget=1.0 if quick else 3.0)
                pairs = count * slots * (slots - 1) / 2
                rows.append(_row(case, name, threads, timing, pairs, gate, cpu_name(), common))
    for metric in ("lcs", "edit", "token_f1", "exact"):
        questions = 20_000 if quick else 1_000_000
        found = _on_gpu(questions, 16, 64, metric)
        if found:
            import torch

            case = f"{metric} K=16 L=64 N={questions}"
            device = torch.cuda.get_device_name()
            rows.append(
                _row(
                    case, "robustft Triton", 0, found[0], questions * 120, found[1], device, common
                )
            )
    return rows


def _row(
    case: str,
    name: str,
    threads: int,
    timing: Timing,
    pairs: float,
    gate: str,
    device: str,
    common: dict[str, Any],
) -> Row:
    return Row(
        benchmark="consistency",
        case=case,
        contender=name,
        threads=threads,
        ms_p20=timing.p20,
        ms_p50=timing.p50,
        ms_p80=timing.p80,
        rate=pairs / timing.p50 / 1e3,
        unit="M pairs/s",
        correct=gate,
        device=device,
        **common,
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table, append it to --out; status 1 when a gate failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, under a minute")
    parser.add_argument("--out", type=Path, help="append CSV rows to this file")
    options = parser.parse_args(arguments)
    require_rows_file(options.out)
    rows = run(options.quick)
    print(table(rows))
    missing = [peer for peer in _PEERS if importlib.util.find_spec(peer) is None]
    if missing:
        print(f"not run (not installed): {', '.join(missing)}")
    if not any("Triton" in row.contender for row in rows):
        print("not run (no GPU here): robustft Triton")
    if options.out:
        append_rows(options.out, rows)
    return int(any(row.correct == "NO" for row in rows))
