"""What token statistics are measured against: PyTorch as people write it, and other packages.

Each function returns name -> call. A package that is missing, or that refuses the case, is not run
and says why in `refused`. No peer computes all seven outputs; most compute one or two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
Calls = dict[str, Call]


def eager(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and log-probability with four passes over the logits."""
    log_p = torch.log_softmax(x, -1)
    return -(log_p.exp() * log_p).sum(-1), log_p.gather(-1, ids[:, None])[:, 0]


def eager_float32(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float32, whatever the logits are."""
    return eager(x.float(), ids)


def all_outputs(x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """Everything `token_stats` gives, for torch.compile."""
    x = x.float()
    level = x.gather(-1, ids[:, None])
    lse = x.logsumexp(-1)
    entropy = lse - (torch.softmax(x, -1) * x).sum(-1)
    top = x.topk(2, -1)
    rank = (x > level).sum(-1)
    best = top.values[:, 0]
    return entropy, level[:, 0] - lse, lse, best - lse, top.indices[:, 0], rank


def torch_calls(x: Tensor, ids: Tensor, compiled: bool) -> Calls:
    """PyTorch alone, for logits [N, V] and targets [N]."""
    calls: Calls = {"torch eager": lambda: eager(x, ids)}
    if x.dtype != torch.float32:
        calls["torch eager, float32"] = lambda: eager_float32(x, ids)
    if compiled:
        two = torch.compile(eager_float32, dynamic=False)
        everything = torch.compile(all_outputs, dynamic=False)
        calls["torch.compile"] = lambda: two(x, ids)
        calls["torch.compile, all outputs"] = lambda: everything(x, ids)
    return calls


def packages_from_logits(x: Tensor, ids: Tensor) -> tuple[Calls, dict[str, str]]:
    """Packages that start from logits [N, V]: calls, and why the others are not run."""

    def trl() -> Callable[[], Any]:
        from trl.trainer.utils import selective_log_softmax_and_entropy as call

        return lambda: call(x, ids)

    def liger() -> Callable[[], Any]:
        from liger_kernel.transformers.functional import liger_cross_entropy as call

        return lambda: call(x, ids, reduction="none")

    def quack() -> Callable[[], Any]:
        from quack.cross_entropy import cross_entropy as call

        return lambda: call(x, ids, reduction="none")

    return runnable(
        {
            "TRL logprob and entropy": trl,
            "Liger cross-entropy": liger,
            "quack cross-entropy": quack,
        }
    )


def packages_from_hidden(
    hidden: Tensor, weight: Tensor, ids: Tensor
) -> tuple[Calls, dict[str, str]]:
    """Packages that start from hidden [N, D] and weight [V, D]."""

    def cut() -> Callable[[], Any]:
        from cut_cross_entropy import linear_cross_entropy as call

        impl = "cce" if hidden.is_cuda else "torch_compile"  # its Triton kernels need a GPU
        return lambda: call(hidden, weight, ids, reduction="none", impl=impl)

    def liger() -> Callable[[], Any]:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as call

        return lambda: call(hidden, weight, ids)

    def liger_scaled() -> Callable[[], Any]:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Call

        return lambda: Call.apply(hidden, weight, ids, return_entropy=True)

    def quack() -> Callable[[], Any]:
        from quack.linear_cross_entropy import linear_cross_entropy_func as call

        return lambda: call(hidden, weight, None, ids, reduction="none")

    def verl() -> Callable[[], Any]:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy as call

        return lambda: call(hidden, weight, ids, 1.0, "none")

    return runnable(
        {
            "cut-cross-entropy": cut,
            "Liger linear cross-entropy": liger,
            "Liger scaled cross-entropy, entropy": liger_scaled,
            "quack linear cross-entropy": quack,
            "verl linear cross-entropy": verl,
        }
    )


def those_that_run(calls: Calls) -> tuple[Calls, dict[str, str]]:
    """The calls that run here; and why the others do not (no compiler, too little memory)."""

    def maker(call: Call) -> Callable[[], Call]:
        return lambda: call

    return runnable({name: maker(call) for name, call in calls.items()})


def runnable(makers: dict[str, Callable[[], Callable[[], Any]]]) -> tuple[Calls, dict[str, str]]:
    """The calls that makers make and that run, by name; and why the others do not."""
    calls: Calls = {}
    refused: dict[str, str] = {}
    for name, make in makers.items():
        try:
            call = make()
            call()
        except ImportError as error:
            refused[name] = f"not installed ({error.name})" if error.name else str(error)
        except Exception as error:  # a peer that fails must not end the benchmark
            first = (str(error).strip().splitlines() or ["no message"])[0]
            refused[name] = f"{type(error).__name__}: {first[:100]}"
        else:
            calls[name] = call
    return calls, refused
