# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
"""The gradient of token statistics for the logits, one Triton program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustft_kernels.partials_triton import LOG2E, capped, flat_ids, on
from robustft_kernels.reference import Grads, Options, Saved
from robustft_kernels.token_stats import rows_view
from robustft_kernels.token_stats_triton import based_at

BLOCK = 4096  # columns a program takes at a time
LOG2E_ = tl.constexpr(LOG2E)


@triton.jit
def _gradient(x, y_top, log_top, a, b, rate, cap, CAPPED: tl.constexpr):
    """What every column has of dloss/dx: p (a + b d), and dz/dx, with d = z - z_max."""
    y = capped(x, cap, CAPPED)
    # Far enough down for p = 0, and finite: 0 * inf is NaN. A row with NaN has a NaN log_top.
    d = tl.maximum((y - y_top) * rate, -1e4)
    g = tl.exp2(d * LOG2E_ + log_top * LOG2E_)
    slope = rate
    if CAPPED:
        u = y / cap
        slope = tl.where(tl.abs(x) == float("inf"), rate, rate * (1.0 - u * u))
        return g * (a + b * d) * slope, slope
    return g * (a * rate + b * rate * d), slope


@triton.jit
def _store(p, value, tile, head, length, BLOCK: tl.constexpr):
    """Write one tile of a row that lies in [head, length) from p; 128 bits at a time inside."""
    here = tile * BLOCK + tl.arange(0, BLOCK)
    value = value.to(p.dtype.element_ty)
    if (tile * BLOCK >= head) & (tile * BLOCK + BLOCK <= length):
        tl.store(p + here, value)
    else:
        tl.store(p + here, value, mask=(here >= head) & (here < length))


@triton.jit(
    do_not_specialize=[
        "target_ptr",
        "base",
        "out_base",
        "inner",
        "outer_stride",
        "inner_stride",
        "out_outer_stride",
        "out_inner_stride",
        "vocab",
        "ignore_index",
    ]
)
def backward_kernel(
    x_ptr,  # logits; 16-byte aligned where ALIGN is more than 1
    out_ptr,  # gradient, likewise; may be x_ptr
    target_ptr,  # [N] int64, or a dummy
    entropy_ptr,  # [N] forward results
    max_logprob_ptr,
    argmax_ptr,
    entropy_grad_ptr,  # [N] cotangents
    logprob_grad_ptr,
    logsumexp_grad_ptr,
    max_logprob_grad_ptr,
    base: tl.int64,  # elements from x_ptr to the first row
    out_base: tl.int64,
    inner,  # row r starts at (r // inner) * outer_stride + (r % inner) * inner_stride
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    out_outer_stride: tl.int64,
    out_inner_stride: tl.int64,
    vocab,
    ignore_index: tl.int64,
    rate,  # 1 / temperature
    cap,
    HAS_TARGET: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIGN: tl.constexpr,  # columns of a boundary both rows lie alike to; 1: they lie differently
    BLOCK: tl.constexpr,
):
    """One row. p_j (a + b (z_j - z_max)) plus the target's and the maximum's own terms.

    Loads and stores are 128 bits wide whatever the row's alignment: both pointers are moved down to
    a boundary, and the columns before the row are read but not written.
    """
    row = tl.program_id(0).to(tl.int64)
    start = base + (row // inner) * outer_stride + (row % inner) * inner_stride
    out_start = out_base + (row // inner) * out_outer_stride + (row % inner) * out_inner_stride
    x_row = x_ptr + start
    out_row = out_ptr + out_start
    head = (start % ALIGN).to(tl.int32)
    p = x_ptr + start // ALIGN * ALIGN
    q = out_ptr + out_start // ALIGN * ALIGN
    length = head + vocab
    tiles = tl.cdiv(length, BLOCK)

    g_entropy = tl.load(entropy_grad_ptr + row)
    g_logsumexp = tl.load(logsumexp_grad_ptr + row)
    g_top = tl.load(max_logprob_grad_ptr + row)
    g_logprob = 0.0
    target = tl.full([], -1, tl.int64)
    if HAS_TARGET:
        target = tl.load(target_ptr + row)
        g_logprob = tl.load(logprob_grad_ptr + row)
        g_logprob = tl.where(target == ignore_index, 0.0, g_logprob)
    if (g_entropy == 0.0) & (g_logprob == 0.0) & (g_logsumexp == 0.0) & (g_top == 0.0):
        # Zeros whatever the row holds; it need not be read.
        for tile in range(0, tiles):
            _store(q, tl.zeros([BLOCK], tl.float32), tile, head, length, BLOCK)
        return

    log_top = tl.load(max_logprob_ptr + row)
    argmax = tl.load(argmax_ptr + row)
    a = g_logsumexp - g_logprob - g_top - g_entropy * (log_top + tl.load(entropy_ptr + row))
    # Read before the row is overwritten. A row with NaN has no argmax, but a NaN log_top.
    best = tl.maximum(argmax, 0)
    x_best = tl.load(x_row + best).to(tl.float32)
    inside = (target >= 0) & (target < vocab)
    x_target = tl.load(x_row + target, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()
    y_top = capped(x_best, cap, CAPPED)

    group = tl.arange(0, BLOCK) // ALIGN * ALIGN
    for tile in range(0, tiles):
        here = tile * BLOCK + tl.arange(0, BLOCK)
        # Whole groups, so that this stays wide; the last may reach past the row, not its 16 bytes.
        x = tl.load(p + here, mask=tile * BLOCK + group < length, other=0.0).to(tl.float32)
        g, _ = _gradient(x, y_top, log_top, a, -g_entropy, rate, cap, CAPPED)
        _store(q, g, tile, head, length, BLOCK)

    # The maximum's and the target's own terms, over what the loop wrote there.
    tl.debug_barrier()
    g, slope = _gradient(x_best, y_top, log_top, a, -g_entropy, rate, cap, CAPPED)
    g += tl.where(best == argmax, g_top, 0.0) * slope
    g += tl.where(best == target, g_logprob, 0.0) * slope
    tl.store(out_row + best, g.to(out_ptr.dtype.element_ty))
    if HAS_TARGET:
        g, slope = _gradient(x_target, y_top, log_top, a, -g_entropy, rate, cap, CAPPED)
        g += g_logprob * slope
        own = inside & (target != best)
        tl.store(out_row + target, g.to(out_ptr.dtype.element_ty), mask=own)


def backward(grads: Grads, logits: Tensor, saved: Saved, options: Options, out: Tensor) -> None:
    """Write d(loss)/d(logits) into `out`, shaped like logits and possibly the same memory."""
    x, to = rows_view(logits), rows_view(out)
    rows = x.shape[0] * x.shape[1]
    if rows == 0:
        return
    zero = torch.zeros(rows, dtype=torch.float32, device=x.device)
    given = [zero if g is None else g.reshape(-1).contiguous() for g in grads]
    targets = None if saved.target_ids is None else flat_ids(saved.target_ids)
    x_base, x_extra = based_at(x, 16)
    out_base, out_extra = based_at(to, 16)
    align = 16 // x.element_size()
    apart = (x_extra - out_extra, x.stride(0) - to.stride(0), x.stride(1) - to.stride(1))
    on_boundary = x_base.data_ptr() % 16 == 0 == out_base.data_ptr() % 16
    with on(x.device):
        backward_kernel[(rows,)](
            x_base,
            out_base,
            saved.argmax if targets is None else targets,
            saved.entropy.contiguous(),
            saved.max_logprob.contiguous(),
            saved.argmax.contiguous(),
            *given,
            x_extra,
            out_extra,
            x.shape[1],
            x.stride(0),
            x.stride(1),
            to.stride(0),
            to.stride(1),
            x.shape[2],
            options.ignore_index,
            1 / options.temperature,
            options.softcap,
            HAS_TARGET=targets is not None,
            CAPPED=options.softcap > 0,
            ALIGN=align if on_boundary and not any(step % align for step in apart) else 1,
            BLOCK=BLOCK,
            num_warps=8,
        )
