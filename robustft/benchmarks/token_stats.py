"""Token statistics from logits [N, V], in GB/s of logits read.

Beside PyTorch, other packages where installed, and the machine's own read (CPU) or copy (GPU)
bandwidth in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustft.benchmarks import token_peers
from robustft.benchmarks.measure import Row, compare, rows_of, timed_together
from robustft_kernels import TokenStats, token_stats
from robustft_kernels.reference import Options, token_stats_reference
from robustft_kernels.testing import some_rows, spread_rows, violations

OURS = "robustft token_stats"
LIMIT = {"cpu": "limit: reading alone", "cuda": "limit: copying alone"}
ONE_SUM = "logsumexp alone, same tiles"
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")
PACKAGES = ("robustft", "torch", "triton", *PEERS)
LOADS = (2, 3, 4)  # 128-bit loads of a thread at a time, to compare on a GPU
CHECKED = 8  # rows compared with the reference
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


def gate(found: TokenStats, x: Tensor, ids: Tensor) -> str:
    """Whether rows from first to last are within the tests' tolerances of the reference."""
    rows = spread_rows(CHECKED, len(x), x.device)
    expected = token_stats_reference(x[rows], ids[rows])
    return "NO" if violations(some_rows(found, rows), expected) else "yes"


def limit_call(x: Tensor) -> Callable[[], Any]:
    """Reads x once; on a GPU, copies half of it onto the other half: as many bytes moved."""
    if x.device.type == "cuda":
        half = x.numel() // 2
        flat, out = x.view(-1)[:half], torch.empty(half, dtype=x.dtype, device=x.device)
        return lambda: out.copy_(flat)
    whole = x.view(-1)[: x.numel() // 2 * 2].view(torch.int32)
    return lambda: whole.amax()


def _kernel(x: Tensor, ids: Tensor, loads: int) -> token_peers.Call:
    from robustft_kernels import token_stats_triton as launch

    return lambda: launch.forward(x, ids, Options(), H=loads)


def measure(case: Case, device: str, quick: bool) -> tuple[list[Row], dict[str, str]]:
    """The rows of one case, and the peers that could not run."""
    x, ids = inputs(case, device)
    calls: token_peers.Calls = {LIMIT[device]: limit_call(x), OURS: lambda: token_stats(x, ids)}
    if device == "cuda":
        from robustft.benchmarks.logsumexp_triton import logsumexp

        calls[ONE_SUM] = lambda: logsumexp(x)
        if not quick:
            calls |= {f"robustft, kernel alone, H={h}": _kernel(x, ids, h) for h in LOADS}
    plain, unable = token_peers.those_that_run(token_peers.torch_calls(x, ids, compiled=not quick))
    packages, refused = token_peers.packages_from_logits(x, ids)
    calls |= plain | packages
    correct = {OURS: gate(calls[OURS](), x, ids)}
    budget = 4.0 if quick else 15.0
    timings = timed_together(calls, device=device, repeats=15, budget=budget)
    rows = rows_of(
        "token-stats",
        case,
        calls,
        timings,
        rate=lambda ms: x.numel() * x.element_size() / ms / 1e6,
        unit="GB/s",
        correct=correct,
        device=device,
        packages=PACKAGES,
    )
    return rows, unable | refused


def main(arguments: list[str] | None = None) -> int:
    """Print the table, append it to --out; status 1 when a gate failed."""
    return compare(__doc__, arguments, cases=cases, measure=measure, ours=OURS)
