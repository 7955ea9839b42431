"""Entropy and log-probability of logits [N, V] and their gradient, in GB/s of what must be moved.

That is the logits read twice and the gradient written once, which is also what the limit does. The
loss is the sum of entropy and negative log-probability, as in entropy-regularised training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustft.benchmarks import token_peers
from robustft.benchmarks.measure import Row, compare, rows_of, timed_together
from robustft.benchmarks.token_stats import CHECKED, PACKAGES, Case, inputs, limit_call
from robustft_kernels import token_stats
from robustft_kernels.testing import spread_rows

OURS = "robustft token_stats"
LIMIT = "limit: reading and copying alone"


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on a device."""
    if device == "cuda":
        shapes = [(8192, 128256, "bfloat16"), (8192, 128257, "bfloat16")]
        return [Case(*shape) for shape in shapes[: 1 if quick else 2]]
    rows = 256 if quick else 1024
    return [Case(rows, 49152, t) for t in ("float32", "bfloat16")]


def ours(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and log-probability by this package."""
    stats = token_stats(x, ids)
    assert stats.logprob is not None
    return stats.entropy, stats.logprob


def gradient(
    outputs: Callable[[Tensor, Tensor], tuple[Tensor, ...]], x: Tensor, ids: Tensor
) -> Any:
    """d(sum of entropy and negative log-probability)/dx [N, V]."""
    entropy, logprob, *_ = outputs(x, ids)
    return torch.autograd.grad((entropy.float() - logprob.float()).sum(), x)[0]


def gate(found: Tensor, x: Tensor, ids: Tensor) -> str:
    """Whether gradients of rows from first to last are the float64 ones, rounded once."""
    rows = spread_rows(CHECKED, len(x), x.device)
    few = x[rows].detach().double().requires_grad_()
    exact = gradient(token_peers.eager, few, ids[rows])
    slack = torch.finfo(x.dtype).eps * exact.abs() + 3e-6
    return "yes" if ((found[rows].double() - exact).abs() <= slack).all() else "NO"


def limit(x: Tensor) -> Callable[[], Any]:
    """Moves what must be moved: x read, x read again, as much written."""
    source, out, read = x.detach(), torch.empty_like(x), limit_call(x.detach())

    def run() -> None:
        read()
        out.copy_(source)

    return run


def measure(case: Case, device: str, quick: bool) -> tuple[list[Row], dict[str, str]]:
    """The rows of one case, and the peers that could not run."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        x, ids = inputs(case, device)
        x = x.requires_grad_()
        peers: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
            "torch eager": token_peers.eager,
        }
        if case.dtype != "float32":
            peers["torch eager, float32"] = token_peers.eager_float32
        if not quick:
            peers["torch.compile"] = torch.compile(token_peers.eager_float32, dynamic=False)
        calls, refused = token_peers.those_that_run(
            {name: functools.partial(gradient, outputs, x, ids) for name, outputs in peers.items()}
        )
        calls = {LIMIT: limit(x), OURS: lambda: gradient(ours, x, ids)} | calls
        timings = timed_together(calls, device=device, repeats=9, budget=4.0 if quick else 20.0)
        rows = rows_of(
            "token-gradients",
            case,
            calls,
            timings,
            rate=lambda ms: 3 * x.numel() * x.element_size() / ms / 1e6,
            unit="GB/s",
            correct={OURS: gate(calls[OURS](), x, ids)},
            device=device,
            packages=PACKAGES,
        )
    return rows, refused


def main(arguments: list[str] | None = None) -> int:
    """Print the table, append it to --out; status 1 when a gate failed."""
    return compare(__doc__, arguments, cases=cases, measure=measure, ours=OURS)
