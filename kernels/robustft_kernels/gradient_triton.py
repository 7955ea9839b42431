# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
"""The gradient of token statistics for the logits, one Triton program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustft_kernels.partials_triton import capped, flat_ids, on
from robustft_kernels.reference import Grads
from robustft_kernels.token_stats import rows_view


@triton.jit
def backward_kernel(
    x_ptr,  # logits
    out_ptr,  # gradient, may be x_ptr
    target_ptr,  # [N] int64, or a dummy
    entropy_ptr,  # [N] forward results
    max_logprob_ptr,
    argmax_ptr,
    entropy_grad_ptr,  # [N] cotangents
    logprob_grad_ptr,
    logsumexp_grad_ptr,
    max_logprob_grad_ptr,
    inner,
    outer_stride,
    inner_stride,
    out_outer_stride,
    out_inner_stride,
    vocab,
    ignore_index,
    rate,  # 1 / temperature
    cap,
    HAS_TARGET: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. p_j (a + b (z_j - z_max)) plus the target's and the maximum's own terms."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + (row // inner) * outer_stride + (row % inner) * inner_stride
    out_row = out_ptr + (row // inner) * out_outer_stride + (row % inner) * out_inner_stride
    g_entropy = tl.load(entropy_grad_ptr + row)
    g_logsumexp = tl.load(logsumexp_grad_ptr + row)
    g_top = tl.load(max_logprob_grad_ptr + row)
    g_logprob = 0.0
    target = -1
    if HAS_TARGET:
        target = tl.load(target_ptr + row)
        g_logprob = tl.load(logprob_grad_ptr + row)
        g_logprob = tl.where(target == ignore_index, 0.0, g_logprob)
    log_top = tl.load(max_logprob_ptr + row)
    argmax = tl.load(argmax_ptr + row)
    a = g_logsumexp - g_logprob - g_top - g_entropy * (log_top + tl.load(entropy_ptr + row))
    idle = (g_entropy == 0.0) & (g_logprob == 0.0) & (g_logsumexp == 0.0) & (g_top == 0.0)
    # Read before the row is overwritten; NaN rows have no argmax, but a NaN log_top.
    top = tl.load(x_row + tl.maximum(argmax, 0)).to(tl.float32)
    tl.debug_barrier()
    y_top = capped(top, cap, CAPPED)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < vocab
        x = tl.load(x_row + column, mask=live, other=float("-inf")).to(tl.float32)
        y = capped(x, cap, CAPPED)
        d = (y - y_top) * rate
        p = tl.exp(d + log_top)
        g = tl.where(p == 0.0, 0.0, p * (a - g_entropy * d))
        g += tl.where(column == argmax, g_top, 0.0)
        if HAS_TARGET:
            g += tl.where(column == target, g_logprob, 0.0)
        slope = rate
        if CAPPED:
            u = y / cap
            slope = tl.where(tl.abs(x) == float("inf"), rate, rate * (1.0 - u * u))
        g = tl.where(idle, 0.0, g * slope)
        tl.store(out_row + column, g.to(out_ptr.dtype.element_ty), mask=live)


def backward(
    grads: Grads,
    logits: Tensor,
    target_ids: Tensor | None,
    entropy: Tensor,
    max_logprob: Tensor,
    argmax: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    out: Tensor,
) -> None:
    """Write d(loss)/d(logits) into `out`, shaped like logits and possibly the same memory."""
    x, to = rows_view(logits), rows_view(out)
    rows = x.shape[0] * x.shape[1]
    if rows == 0:
        return
    zero = torch.zeros(rows, dtype=torch.float32, device=x.device)
    given = [zero if g is None else g.reshape(-1).contiguous() for g in grads]
    targets = None if target_ids is None else flat_ids(target_ids)
    with on(x.device):
        backward_kernel[(rows,)](
            x,
            to,
            argmax if targets is None else targets,
            entropy.contiguous(),
            max_logprob.contiguous(),
            argmax.contiguous(),
            *given,
            x.shape[1],
            x.stride(0),
            x.stride(1),
            to.stride(0),
            to.stride(1),
            x.shape[2],
            ignore_index,
            1 / temperature,
            softcap,
            HAS_TARGET=targets is not None,
            CAPPED=softcap > 0,
            BLOCK=4096,
            num_warps=8,
        )
