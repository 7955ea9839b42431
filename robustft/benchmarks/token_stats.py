"""Token statistics from logits [N, V], in GB/s of logits read.

Beside PyTorch, other packages where installed, and the machine's own read (CPU) or copy (GPU)
bandwidth in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustft.benchmarks import token_peers
from robustft.benchmarks.measure import (
    Row,
    append_rows,
    commit,
    device_name,
    extra_mib,
    table,
    timed_together,
    versions,
)
from robustft_kernels import token_stats
from robustft_kernels.reference import token_stats_reference
from robustft_kernels.testing import violations

OURS = "robustft token_stats"
LIMIT = {"cpu": "limit: reading alone", "cuda": "limit: copying alone"}
ONE_SUM = "logsumexp alone, same tiles"
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")
PACKAGES = ("robustft", "torch", "triton", *PEERS)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of logits."""

    rows: int
    vocab: int
    dtype: str

    def __str__(self) -> str:
        return f"N={self.rows} V={self.vocab} {self.dtype}"


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on a device."""
    if device == "cuda":
        shapes = [(8192, 128256, "bfloat16"), (8192, 128257, "bfloat16")]
        more = [(4096, 128256, "float32"), (8192, 49152, "bfloat16"), (32, 151936, "bfloat16")]
        return [Case(*shape) for shape in (shapes if quick else shapes + more)]
    if quick:
        return [Case(1024, 49152, "float32"), Case(1024, 49152, "bfloat16")]
    return [Case(2048, v, t) for v in (49152, 128256) for t in ("float32", "bfloat16")]


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Logits [N, V], a few random rows over and over, and random targets [N]."""
    torch.manual_seed(0)
    few = (torch.randn(min(case.rows, 32), case.vocab, device=device) * 4).to(TYPES[case.dtype])
    x = few.repeat(-(-case.rows // len(few)), 1)[: case.rows]
    return x, torch.randint(case.vocab, (case.rows,), device=device)


def gate(x: Tensor, ids: Tensor) -> str:
    """Whether the first rows agree with the float64 reference within the tests' tolerances."""
    few, wanted = x[:8], ids[:8]
    return (
        "NO" if violations(token_stats(few, wanted), token_stats_reference(few, wanted)) else "yes"
    )


def limit_call(x: Tensor) -> Callable[[], Any]:
    """Reads x once; on a GPU, copies half of it onto the other half: as many bytes moved."""
    if x.device.type == "cuda":
        half = x.numel() // 2
        flat, out = x.view(-1)[:half], torch.empty(half, dtype=x.dtype, device=x.device)
        return lambda: out.copy_(flat)
    whole = x.view(-1)[: x.numel() // 2 * 2].view(torch.int32)
    return lambda: whole.amax()


def measure(case: Case, device: str, quick: bool) -> tuple[list[Row], dict[str, str]]:
    """The rows of one case, and the peers that could not run."""
    x, ids = inputs(case, device)
    correct = gate(x, ids)
    calls: token_peers.Calls = {LIMIT[device]: limit_call(x), OURS: lambda: token_stats(x, ids)}
    if device == "cuda":
        from robustft.benchmarks.logsumexp_triton import logsumexp

        calls[ONE_SUM] = lambda: logsumexp(x)
    calls |= token_peers.torch_calls(x, ids, compiled=not quick)
    packages, refused = token_peers.packages_from_logits(x, ids)
    calls |= packages
    budget = 4.0 if quick else 15.0
    timings = timed_together(calls, device=device, repeats=15, budget=budget)
    rows = []
    for name, timing in timings.items():
        rows.append(
            Row(
                benchmark="token-stats",
                case=str(case),
                contender=name,
                threads=0 if device == "cuda" else torch.get_num_threads(),
                ms_p20=timing.p20,
                ms_p50=timing.p50,
                ms_p80=timing.p80,
                rate=x.numel() * x.element_size() / timing.p50 / 1e6,
                unit="GB/s",
                correct=correct if name == OURS else "-",
                device=device_name(device),
                versions=versions(PACKAGES),
                commit=commit(),
                extra_mib=None if name.startswith("limit") else extra_mib(calls[name], device),
            )
        )
    return rows, refused


def verdict(rows: list[Row], ours: str, limit: str) -> str:
    """One line a case: our share of the limit and how many times faster than each peer."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        found = {row.contender: row for row in rows if row.case == case}
        own = found[ours]
        share = found[limit].ms_p50 / own.ms_p50
        peers = [row for row in found.values() if row.contender not in (ours, limit)]
        ratios = ", ".join(f"{row.ms_p50 / own.ms_p50:.2f}x {row.contender}" for row in peers)
        lines.append(f"{case}: {share:.0%} of the limit; speed {ratios}")
    return "\n".join(lines)


def arguments_of(description: str | None, arguments: list[str] | None) -> argparse.Namespace:
    """The options that the token benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, under a minute")
    parser.add_argument("--out", type=Path, help="append CSV rows to this file")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, append it to --out; status 1 when a gate failed."""
    options = arguments_of(__doc__, arguments)
    rows: list[Row] = []
    refused: dict[str, str] = {}
    with torch.inference_mode():
        for case in cases(options.device, options.quick):
            made, unable = measure(case, options.device, options.quick)
            rows += made
            refused |= unable
    print(table(rows))
    print(verdict(rows, OURS, LIMIT[options.device]))
    for name, reason in refused.items():
        print(f"not run: {name}: {reason}")
    if options.out:
        append_rows(options.out, rows)
    return int(any(row.correct == "NO" for row in rows))
