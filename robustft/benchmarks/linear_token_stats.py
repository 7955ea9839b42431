"""Token statistics from hidden states [N, D] and lm_head [V, D], in GFLOP/s of the product.

The limit is the bare matrix product `hidden @ weight.T` in the same run, into memory that is
already there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from robustft.benchmarks import token_peers
from robustft.benchmarks.measure import Row, compare, rows_of, timed_together
from robustft.benchmarks.token_stats import CHECKED, PACKAGES, TYPES
from robustft_kernels import TokenStats, linear_token_stats
from robustft_kernels.reference import token_stats_reference
from robustft_kernels.testing import some_rows, spread_rows, violations

OURS = "robustft linear_token_stats"
LIMIT = "limit: hidden @ weight.T alone"
DESIGNS = {f"robustft, {design}": design for design in ("chunked", "fused")}  # on a GPU
# Other settings of the fused kernel to compare on a GPU, beside its own choice.
FUSED_TILES = ({"num_stages": 4}, {"BLOCK_V": 128, "num_stages": 4}, {"GROUP": 64})


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of the product."""

    rows: int
    width: int
    vocab: int
    dtype: str

    def __str__(self) -> str:
        return f"N={self.rows} D={self.width} V={self.vocab} {self.dtype}"


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on a device."""
    if device == "cuda":
        main = [Case(8192, 4096, 128256, "bfloat16")]
        return main if quick else [*main, Case(8192, 2048, 151936, "bfloat16")]
    if quick:
        return [Case(512, 576, 49152, t) for t in ("float32", "bfloat16")]
    shapes = [(2048, 576, 49152), (2048, 2048, 49152), (512, 4096, 128256)]
    return [Case(*shape, t) for shape in shapes for t in ("float32", "bfloat16")]


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden [N, D], weight [V, D] such that logits have deviation 4, targets [N]."""
    torch.manual_seed(0)
    dtype = TYPES[case.dtype]
    hidden = torch.randn(case.rows, case.width, device=device).to(dtype)
    weight = torch.empty(case.vocab, case.width, dtype=dtype, device=device)
    for start in range(0, case.vocab, 8192):
        some = weight[start : start + 8192]
        some.copy_(torch.randn(some.shape, device=device) * (4 / case.width**0.5))
    return hidden, weight, torch.randint(case.vocab, (case.rows,), device=device)


def gate(found: TokenStats, hidden: Tensor, weight: Tensor, ids: Tensor) -> str:
    """Whether rows from first to last are as good as the logits that the plain product gives."""
    rows = spread_rows(CHECKED, len(hidden), hidden.device)
    few, wanted = hidden[rows], ids[rows]
    logits, rounded = few.double() @ weight.double().T, few @ weight.T
    exact, plain = token_stats_reference(logits, wanted), token_stats_reference(rounded, wanted)
    # 16-bit logits err by half a unit each; which output shows it most depends on the rows.
    outputs = ("entropy", "logprob", "logsumexp", "max_logprob")
    errors = [(getattr(plain, one) - getattr(exact, one)).abs().max() for one in outputs]
    slack = max(1.5 * float(max(errors)), 1e-4)
    found = some_rows(found, rows)
    assert found.rank is not None
    problems = violations(found, exact, absolute=slack, relative=slack)
    right = not [p for p in problems if not p.startswith(("argmax", "rank"))]
    # Logits nearer to each other than twice their error may change places.
    near = 3 * (rounded.double() - logits).abs().max()
    level = logits.gather(1, wanted[:, None])
    top = logits.gather(1, found.argmax[:, None].clamp_min(0))[:, 0]
    least, most = (logits > level + near).sum(1), (logits >= level - near).sum(1) - 1
    ordered = (top >= logits.amax(1) - near) & (least <= found.rank) & (found.rank <= most)
    return "yes" if right and ordered.all() else "NO"


def contenders(
    hidden: Tensor, weight: Tensor, ids: Tensor, quick: bool
) -> tuple[token_peers.Calls, dict[str, str]]:
    """What runs on one case, the limit first; and why the others do not."""
    device = hidden.device.type
    product = hidden.new_empty(hidden.shape[0], weight.shape[0])
    calls: token_peers.Calls = {
        LIMIT: lambda: torch.mm(hidden, weight.T, out=product),
        OURS: lambda: linear_token_stats(hidden, weight, ids),
    }
    others: token_peers.Calls = {
        "torch eager": lambda: token_peers.eager(hidden @ weight.T, ids),
    }
    if not quick:
        both = torch.compile(lambda h, w, t: token_peers.eager_float32(h @ w.T, t), dynamic=False)
        others["torch.compile"] = lambda: both(hidden, weight, ids)
    if device == "cuda":
        for name, design in DESIGNS.items():
            others[name] = functools.partial(linear_token_stats, hidden, weight, ids, design=design)
        for tile in () if quick else FUSED_TILES:  # some do not fit every chip
            name = "robustft, fused, " + " ".join(f"{key}={value}" for key, value in tile.items())
            others[name] = _fused(hidden, weight, ids, tile)
    others, unable = token_peers.those_that_run(others)
    packages, refused = token_peers.packages_from_hidden(hidden, weight, ids)
    return calls | others | packages, unable | refused


def _fused(hidden: Tensor, weight: Tensor, ids: Tensor, tile: dict[str, int]) -> token_peers.Call:
    from robustft_kernels import linear_token_stats_triton as launch

    level = torch.zeros(hidden.shape[0], device=hidden.device)
    return lambda: launch.forward(hidden, weight, ids, level, None, 1.0, 0.0, **tile)


def measure(case: Case, device: str, quick: bool) -> tuple[list[Row], dict[str, str]]:
    """The rows of one case, and the peers that could not run."""
    hidden, weight, ids = inputs(case, device)
    calls, refused = contenders(hidden, weight, ids, quick)
    judged = [name for name in (OURS, *DESIGNS) if name in calls]
    correct = {name: gate(calls[name](), hidden, weight, ids) for name in judged}
    budget = 6.0 if quick else 25.0
    timings = timed_together(calls, device=device, repeats=9, budget=budget)
    rows = rows_of(
        "linear-token-stats",
        case,
        calls,
        timings,
        rate=lambda ms: 2e-6 * case.rows * case.width * case.vocab / ms,
        unit="GFLOP/s",
        correct=correct,
        device=device,
        packages=PACKAGES,
    )
    return rows, refused


def main(arguments: list[str] | None = None) -> int:
    """Print the table, append it to --out; status 1 when a gate failed."""
    return compare(__doc__, arguments, cases=cases, measure=measure, ours=OURS)
