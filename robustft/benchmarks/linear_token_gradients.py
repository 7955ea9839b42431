"""Gradients of the token statistics for hidden states [N, D] and lm_head [V, D], in GFLOP/s.

Counted are the three matrix products that nobody can do without: the logits, and from their
gradient those of the hidden states and of the weight. The limit does these three alone; whoever
does not keep the logits [N, V] makes them twice. The loss is the sum of entropy and negative
log-probability, as in entropy-regularised training; peers of packages have the latter alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustft.benchmarks import token_peers
from robustft.benchmarks.linear_token_stats import Case, inputs
from robustft.benchmarks.measure import Row, compare, rows_of, timed_together
from robustft.benchmarks.token_stats import CHECKED, PACKAGES
from robustft_kernels import linear_token_stats
from robustft_kernels.testing import spread_rows

OURS = "robustft linear_token_stats"
LIMIT = "limit: the three products alone"
_BLOCK = 256  # rows whose logits the gate holds at a time

Pair = tuple[Tensor, Tensor]


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on a device."""
    if device == "cuda":
        return [Case(8192, 4096, 128256, "bfloat16")]
    shapes = [(256, 576, 49152)] if quick else [(1024, 576, 49152), (512, 2048, 49152)]
    return [Case(*shape, t) for shape in shapes for t in ("float32", "bfloat16")]


def ours(hidden: Tensor, weight: Tensor, ids: Tensor) -> Pair:
    """Entropy and log-probability by this package."""
    stats = linear_token_stats(hidden, weight, ids)
    assert stats.logprob is not None
    return stats.entropy, stats.logprob


def plain(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """The same from logits that are kept, in float32 but for the product."""
    return token_peers.eager_float32(hidden @ weight.T, ids)


def gradients(
    outputs: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
) -> Pair:
    """d(sum of entropy and negative log-probability) by hidden [N, D] and by weight [V, D]."""
    entropy, logprob, *_ = outputs(hidden, weight, ids)
    loss = (entropy.float() - logprob.float()).sum()
    by_hidden, by_weight = torch.autograd.grad(loss, (hidden, weight))
    return by_hidden, by_weight


def by_blocks(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    rows: Tensor,
    words: Tensor,
    dtype: torch.dtype,
) -> Pair:
    """The plain gradients in a dtype, of some rows and of the weights of some words.

    A block of logits at a time, so that they can be had where PyTorch has no memory for them all.
    """
    heads = weight.detach().to(dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    by_hidden = torch.zeros(len(rows), heads.shape[1], dtype=dtype, device=heads.device)
    by_weight = torch.zeros(len(words), heads.shape[1], dtype=sums, device=heads.device)
    for start in range(0, len(hidden), _BLOCK):
        block = hidden[start : start + _BLOCK].detach().to(dtype)
        logits = (block @ heads.T).requires_grad_()
        entropy, logprob, *_ = token_peers.eager(logits.to(sums), ids[start : start + _BLOCK])
        (by_logits,) = torch.autograd.grad((entropy - logprob).sum(), logits)
        by_weight += by_logits[:, words].T.to(sums) @ block.to(sums)
        inside = (rows >= start) & (rows < start + len(block))
        by_hidden[inside] = by_logits[rows[inside] - start] @ heads
    return by_hidden, by_weight.to(dtype)


def gate(found: Pair, hidden: Tensor, weight: Tensor, ids: Tensor) -> str:
    """Whether gradients are as near to the float64 ones as those of the plain product."""
    rows = spread_rows(CHECKED, len(hidden), hidden.device)
    words = torch.cat([spread_rows(CHECKED, len(weight), weight.device), ids[rows]])
    right, usual = (
        by_blocks(hidden, weight, ids, rows, words, dtype)
        for dtype in (torch.float64, hidden.dtype)
    )
    for ours_, plain_, true, chosen in zip(found, usual, right, (rows, words), strict=True):
        error = (ours_[chosen].double() - true).abs().max()
        allowed = (plain_.double() - true).abs().max()
        if not error <= 1.5 * allowed + 1e-6 * true.abs().max():
            return "NO"
    return "yes"


def limit(hidden: Tensor, weight: Tensor) -> Callable[[], Any]:
    """The three products, into memory that is already there."""
    h, w = hidden.detach(), weight.detach()
    logits, by_hidden, by_weight = h @ w.T, torch.empty_like(h), torch.empty_like(w)

    def run() -> None:
        torch.mm(h, w.T, out=logits)
        torch.mm(logits, w, out=by_hidden)
        torch.mm(logits.T, h, out=by_weight)

    return run


def packages(
    hidden: Tensor, weight: Tensor, ids: Tensor
) -> tuple[token_peers.Calls, dict[str, str]]:
    """The gradients of packages' losses, and why those of others cannot be had."""
    forward, refused = token_peers.packages_from_hidden(hidden, weight, ids)

    def differentiated(outputs: token_peers.Call) -> token_peers.Call:
        def call() -> Any:
            found = outputs()
            loss = found[0] if isinstance(found, tuple) else found
            return torch.autograd.grad(loss.sum(), (hidden, weight))

        return call

    calls, more = token_peers.runnable(
        {name: functools.partial(differentiated, outputs) for name, outputs in forward.items()}
    )
    return calls, refused | more


def measure(case: Case, device: str, quick: bool) -> tuple[list[Row], dict[str, str]]:
    """The rows of one case, and the peers that could not run."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        hidden, weight, ids = inputs(case, device)
        given = hidden.requires_grad_(), weight.requires_grad_(), ids
        calls: token_peers.Calls = {
            LIMIT: limit(hidden, weight),
            OURS: lambda: gradients(ours, *given),
        }
        others: token_peers.Calls = {"torch eager": lambda: gradients(plain, *given)}
        if not quick:
            compiled = torch.compile(plain, dynamic=False)
            others["torch.compile"] = lambda: gradients(compiled, *given)
        others, unable = token_peers.those_that_run(others)
        more, refused = packages(*given)
        calls |= others | more
        correct = {OURS: gate(calls[OURS](), *given)}
        timings = timed_together(calls, device=device, repeats=9, budget=6.0 if quick else 30.0)
        rows = rows_of(
            "linear-token-gradients",
            case,
            calls,
            timings,
            rate=lambda ms: 6e-6 * case.rows * case.width * case.vocab / ms,
            unit="GFLOP/s",
            correct=correct,
            device=device,
            packages=PACKAGES,
        )
    return rows, unable | refused


def main(arguments: list[str] | None = None) -> int:
    """Print the table, append it to --out; status 1 when a gate failed."""
    return compare(__doc__, arguments, cases=cases, measure=measure, ours=OURS)
