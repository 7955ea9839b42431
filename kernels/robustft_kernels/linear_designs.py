"""How token statistics are made from hidden states: three designs, none of which holds [N, V]."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from robustft_kernels.reference import Options, Seven, check_range, columns, empty_columns
from robustft_kernels.results import PartialTokenStats, finish
from robustft_kernels.token_stats import forward, native, to_numpy, triton_module

# CPU tiles of logits: small enough for the last-level cache, large enough for a fast GEMM. Many
# rows, because the library packs the weights again for every block of rows.
CPU_ROWS, CPU_COLUMNS = 2048, 3072
# Logits so few that one product and one pass by one thread beat tiles, whose sums take 0.2 ms.
CPU_FEW = 1 << 17
# Bytes of logits at a time where whole rows are made: on a GPU, and in the backward pass.
WORKSPACE = 256 << 20


def by_design(
    design: str,
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> Seven:
    """The statistics of hidden [N, D] @ weight [V, D].T + bias by a design, or by the fastest."""
    given = (hidden, weight, target_ids, bias, options)
    if design == "fused" or (design == "auto" and _fused_is_faster(hidden, weight)):
        return _fused(*given)
    core = native() if hidden.device.type == "cpu" and design == "auto" else None
    few = hidden.shape[0] * weight.shape[0] <= CPU_FEW
    few = few and product_dtype(hidden.dtype) == hidden.dtype
    if core is None or few:
        return _chunked(*given)
    return _tiled(core, *given)


def target_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """The targets' logits [N] in dtype; NaN where there is no target.

    Computed ahead of the tiles and put in their place in them, so that logprob, rank and argmax
    agree on one value whatever the rounding of the matrix product.
    """
    out = hidden.new_empty(hidden.shape[0], dtype=dtype)
    exact = sums_dtype(hidden)
    step = max(1, (1 << 20) // max(1, hidden.shape[1]))
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, start + step)
        ids = target_ids[rows]
        inside = (ids != ignore_index) & (ids >= 0) & (ids < weight.shape[0])
        safe = ids.where(inside, 0)
        product = torch.linalg.vecdot(hidden[rows].to(exact), weight[safe].to(exact))
        if bias is not None:
            product = product + bias[safe]
        out[rows] = product.to(dtype).masked_fill(~inside, torch.nan)
    return out


def sums_dtype(x: Tensor) -> torch.dtype:
    """What sums of products of x's entries are formed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a CPU multiplies matrices of `dtype` in.

    float32 where it lacks the instructions for 16-bit ones: PyTorch's loops for them are ten times
    slower there than float32 products of copies.
    """
    probes = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if dtype not in probes:
        return dtype
    try:
        return dtype if getattr(torch.ops.mkldnn, probes[dtype])() else torch.float32
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return torch.float32


def logits_dtype(x: Tensor) -> torch.dtype:
    """What logits of operands like x are held in: a GPU's sums of 16-bit products are float32."""
    return sums_dtype(x) if x.device.type == "cuda" else x.dtype


def multiply(h: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Put h @ w.T + bias into out."""
    if out.dtype != h.dtype:  # float32 from 16-bit operands, on CUDA alone
        torch.mm(h, w.t(), out_dtype=out.dtype, out=out)
        if bias is not None:
            out += bias
    elif bias is None:
        torch.mm(h, w.t(), out=out)
    else:
        torch.addmm(bias.to(out.dtype), h, w.t(), out=out)


def _tiled(
    core: Any,
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> Seven:
    """CPU: each tile of logits is reduced while it is in the cache, and overwritten by the next."""
    n, vocab = hidden.shape[0], weight.shape[0]
    dtype = product_dtype(hidden.dtype)
    ids = levels = None
    if target_ids is not None:
        check_range(target_ids, vocab, options.ignore_index)
        ids = target_ids.to(torch.int64)
        levels = target_logits(hidden, weight, bias, target_ids, options.ignore_index, dtype)
        levels = levels.to(sums_dtype(hidden))
    out = empty_columns(hidden, torch.Size([n]))
    # Fewer rows, more columns: a product too small is a slow one.
    step = min(8 * CPU_COLUMNS, CPU_COLUMNS * CPU_ROWS // max(1, min(n, CPU_ROWS)))
    copies = None  # of the weights of a tile, where they are not multiplied as they are
    if dtype != hidden.dtype:
        step = min(step, max(1, CPU_ROWS * CPU_COLUMNS // max(1, hidden.shape[1])))
        copies = weight.new_empty((min(vocab, step), hidden.shape[1]), dtype=dtype)
    workspace = hidden.new_empty(min(n, CPU_ROWS) * min(vocab, step), dtype=dtype)
    for start in range(0, n, CPU_ROWS):
        rows = slice(start, min(n, start + CPU_ROWS))
        h = hidden[rows].to(dtype)
        reals = torch.zeros(4, h.shape[0], dtype=torch.float64)
        reals[:2] = -torch.inf
        counts = torch.zeros(2, h.shape[0], dtype=torch.int64)
        for first in range(0, vocab, step):
            w = weight[first : first + step]
            if copies is not None:
                w = copies[: w.shape[0]].copy_(w)
            x = workspace[: h.shape[0] * w.shape[0]].view(1, h.shape[0], w.shape[0])
            multiply(h, w, None if bias is None else bias[first : first + step], x[0])
            core.token_stats_accumulate(
                to_numpy(x),
                None if ids is None else ids[rows].numpy(),
                None if levels is None else levels[rows].numpy(),
                first,
                options.temperature,
                options.softcap,
                torch.get_num_threads(),
                reals.numpy(),
                counts.numpy(),
            )
        top, second, total, weighted = reals.unbind()
        stats = finish(
            PartialTokenStats(
                max=top,
                second=second,
                sum_exp=total,
                weighted=weighted,
                argmax=counts[0],
                target_logit=None if levels is None else levels[rows].double(),
                rank=None if ids is None else counts[1],
                temperature=options.temperature,
                softcap=options.softcap,
            )
        )
        for column, value in zip(out, columns(stats), strict=True):
            column[rows] = value
    return out


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> Seven:
    """Whole rows of logits, as many at a time as the workspace holds, then the logits kernel."""
    n, vocab = hidden.shape[0], weight.shape[0]
    dtype = logits_dtype(hidden)
    step = rows_per_chunk(n, vocab, dtype)
    workspace = torch.empty((step, vocab), dtype=dtype, device=hidden.device)
    out = empty_columns(hidden, torch.Size([n]))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        x = workspace[: hidden[rows].shape[0]]
        multiply(hidden[rows], weight, bias, x)
        ids = None if target_ids is None else target_ids[rows]
        found = forward(x, ids, options)
        if step >= n:  # all of them
            return found
        for column, value in zip(out, found, strict=True):
            column[rows] = value
    return out


def _fused(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> Seven:
    """GPU: one kernel multiplies and reduces; no logit reaches memory."""
    from robustft_kernels import linear_token_stats_triton as launch

    if hidden.device.type != "cuda" or not launch.fits(hidden, weight):
        raise ValueError(
            "design 'fused' needs bfloat16 or float16 on CUDA or ROCm, D a multiple of 64 and "
            "16-byte aligned rows that do not overlap, "
            f"got {hidden.dtype} {tuple(hidden.shape)} on {hidden.device}"
        )
    levels = None
    if target_ids is not None:
        levels = launch.target_logits(hidden, weight, bias, target_ids, options.ignore_index)
    scale = options.temperature, options.softcap
    found: Seven = launch.forward(hidden, weight, target_ids, levels, bias, *scale)
    return found


def _fused_is_faster(hidden: Tensor, weight: Tensor) -> bool:
    """Where the fused kernel was measured to win: Hopper, on any shape that it takes."""
    if hidden.device.type != "cuda" or triton_module() is None:
        return False
    from robustft_kernels import linear_token_stats_triton as launch
    from robustft_kernels.partials_triton import arch_of

    return arch_of(hidden.device) == 90 and launch.fits(hidden, weight)


def rows_per_chunk(n: int, vocab: int, dtype: torch.dtype) -> int:
    """How many rows of logits the workspace holds; a multiple of 128 where it can be."""
    rows = max(1, WORKSPACE // (vocab * dtype.itemsize))
    return max(1, min(n, rows if rows < 128 else rows // 128 * 128))
