# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
"""Token statistics of hidden @ weight.T in one Triton kernel: no logit reaches memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from robustft_kernels.partials_triton import (
    LOG2E,
    NEAR,
    Partials,
    above,
    arch_of,
    capped,
    flat_ids,
    on,
    origin_of,
    processors_of,
    weights,
)
from robustft_kernels.reference import Seven, empty_columns

# Blocks of rows that share a chunk's weights in the L2 cache.
GROUP = 16


@triton.jit
def _next_above(x):
    """The next larger float32; NaN above infinity."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x > 0.0, bits + 1, tl.where(x < 0.0, bits - 1, 1))
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _is_far(m, rate):
    """Whether no origin stands for this maximum."""
    return (tl.abs(m) * rate > NEAR) & (tl.abs(m) < float("inf"))


@triton.jit
def _absorb(
    x,  # [N, V] float32 logits of one tile
    start,  # its first column
    end,
    level,  # [N] the target's logit, its column, and the running state
    target,
    y,
    m,
    second,
    s,
    w,
    best,
    count,
    rate,
    cap,
    HAS_TARGET: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Fold one tile into the running state; see the logits kernel for the arithmetic."""
    column = start + tl.arange(0, BLOCK_V)
    special = start + BLOCK_V > end
    if HAS_TARGET:
        here = (target >= start) & (target < start + BLOCK_V)
        special = special | (tl.max(here.to(tl.int32), axis=0) > 0)
    if special:
        if HAS_TARGET:
            # One value for the target everywhere, so that rank, argmax and logprob agree.
            x = tl.where(column[None, :] == target[:, None], level[:, None], x)
            tie = (x == level[:, None]) & (column[None, :] < target[:, None])
            ahead = ((x > level[:, None]) | tie) & (column < end)[None, :]
            count += tl.sum(ahead.to(tl.int32), axis=1)
        x = tl.where((column < end)[None, :], x, float("-inf"))
    elif HAS_TARGET:
        # Before the target's tile a tie counts, after it it does not.
        bar = tl.where(target >= start, level, _next_above(level))
        count += tl.sum((x >= bar[:, None]).to(tl.float32), axis=1).to(tl.int32)
    old = y if CAPPED else m
    top = tl.max(x, axis=1)
    at = tl.min(tl.where(x == top[:, None], column[None, :], 2147483647), axis=1)
    others = tl.max(tl.where(column[None, :] == at[:, None], float("-inf"), x), axis=1)
    second = tl.maximum(tl.minimum(m, top), tl.maximum(second, others))
    best = tl.where((top > m) | (best < 0), at, best)
    m = tl.maximum(m, top)
    if CAPPED:
        x = capped(x, cap, CAPPED)
        y = tl.maximum(y, tl.max(x, axis=1))
    new = y if CAPPED else m
    c, origin = origin_of(old, rate), origin_of(new, rate)
    shift = c - origin
    was_far, far = _is_far(old, rate), _is_far(new, rate)
    moved = was_far | far
    if tl.max(moved.to(tl.int32), axis=0) > 0:
        # A far row's sums are relative to its maximum itself, not to a rounded product that leaves
        # a residue.
        residue = tl.where(far, 0.0, above(new, rate, origin))
        residue -= tl.where(was_far | (old == float("-inf")), 0.0, above(old, rate, c))
        shift = tl.where(moved, (old - new) * rate + residue, shift)
        x -= tl.where(far, new, 0.0)[:, None]
        origin = tl.where(far, 0.0, origin)
    shift = tl.maximum(shift, -126.0)
    alpha = tl.exp2(shift)
    d, e = weights(x, rate, origin[:, None])
    w = alpha * (w + shift * s) + tl.sum(e * d, axis=1)
    s = alpha * s + tl.sum(e, axis=1)
    return y, m, second, s, w, best, count


@triton.jit(do_not_specialize=["target_ptr", "rows", "vocab"])
def linear_partial_kernel(
    hidden,  # [N, D]: a descriptor with blocks [BLOCK_N, BLOCK_D], or a pointer
    weight,  # [V, D]: a descriptor with blocks [BLOCK_V, BLOCK_D], or a pointer
    bias_ptr,  # [V], or a dummy
    target_ptr,  # [N] int64 columns, or a dummy
    level_ptr,  # [N] float32: the target's logit, NaN without one
    max_ptr,  # [chunks, N] float32, and so on down to rank_ptr
    second_ptr,
    sum_ptr,
    weighted_ptr,
    argmax_ptr,  # [chunks, N] int64
    rank_ptr,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    rows,
    vocab,
    width,  # D, a multiple of BLOCK_D where pointers are used
    rate,  # log2(e) / temperature
    cap,
    HAS_TARGET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    TMA: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_N rows against one chunk of the vocabulary, BLOCK_V columns at a time."""
    # The grid is [row blocks of a group, chunks, groups], the first fastest: programs that run
    # together share a group of row blocks and a few chunks' weights in L2.
    chunk = tl.program_id(1)
    first_row = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N
    if first_row >= rows:
        return
    row = first_row + tl.arange(0, BLOCK_N)
    live = row < rows
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, vocab)

    level = tl.full([BLOCK_N], float("nan"), tl.float32)
    target = tl.full([BLOCK_N], -1, tl.int32)
    if HAS_TARGET:
        level = tl.load(level_ptr + row, mask=live, other=float("nan"))
        target = tl.load(target_ptr + row, mask=live, other=-1).to(tl.int32)
        target = tl.where(level == level, target, -1)
    y = tl.full([BLOCK_N], float("-inf"), tl.float32)
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    second = tl.full([BLOCK_N], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    w = tl.zeros([BLOCK_N], tl.float32)
    best = tl.full([BLOCK_N], -1, tl.int32)
    count = tl.zeros([BLOCK_N], tl.int32)
    if not TMA:
        inside = tl.arange(0, BLOCK_D)
        # Rows and columns past the end read the last one; what they give is dropped below.
        at_row = tl.minimum(row, rows - 1).to(tl.int64) * hidden_stride
        a_ptr = hidden + at_row[:, None] + inside[None, :]

    for start in range(begin, end, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        x = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        if TMA:
            for d in range(0, width, BLOCK_D):
                a = hidden.load([first_row, d])  # [BLOCK_N, BLOCK_D]
                b = weight.load([start, d])  # [BLOCK_V, BLOCK_D]
                x = tl.dot(a, b.T, x)
        else:
            at_column = tl.minimum(column, vocab - 1).to(tl.int64) * weight_stride
            b_ptr = weight + at_column[None, :] + inside[:, None]
            for d in range(0, width, BLOCK_D):
                a = tl.load(a_ptr + d)  # [BLOCK_N, BLOCK_D]
                b = tl.load(b_ptr + d)  # [BLOCK_D, BLOCK_V]
                x = tl.dot(a, b, x)
        if HAS_BIAS:
            x += tl.load(bias_ptr + column, mask=column < end, other=0.0).to(tl.float32)[None, :]
        y, m, second, s, w, best, count = _absorb(
            x,
            start,
            end,
            level,
            target,
            y,
            m,
            second,
            s,
            w,
            best,
            count,
            rate,
            cap,
            HAS_TARGET,
            CAPPED,
            BLOCK_V,
        )

    # From the rounded origin to the maximum itself; an infinite one has no sums to move.
    highest = y if CAPPED else m
    still = _is_far(highest, rate) | (tl.abs(highest) == float("inf"))
    shift = tl.where(still, 0.0, -above(highest, rate, origin_of(highest, rate)))
    share = tl.exp2(shift)
    w = share * (w + shift * s)
    s = share * s
    out = chunk.to(tl.int64) * rows + row
    tl.store(max_ptr + out, m, mask=live)
    tl.store(second_ptr + out, second, mask=live)
    tl.store(sum_ptr + out, s, mask=live)
    tl.store(weighted_ptr + out, w * 0.6931471805599453, mask=live)
    # A row of NaN has no maximum to find; its sums say so.
    tl.store(argmax_ptr + out, tl.minimum(best, vocab - 1).to(tl.int64), mask=live)
    if HAS_TARGET:
        tl.store(rank_ptr + out, count.to(tl.int64), mask=live)


@triton.jit(do_not_specialize=["target_ptr", "vocab", "ignore_index"])
def target_logit_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], or a dummy
    target_ptr,  # [N] int64
    out_ptr,  # [N] float32
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    vocab,
    width,  # D
    ignore_index: tl.int64,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's dot product with its target's weights; NaN where there is no target."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    inside = (target != ignore_index) & (target >= 0) & (target < vocab)
    target = tl.where(inside, target, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + row * hidden_stride + d, mask=d < width, other=0.0)
        w = tl.load(weight_ptr + target * weight_stride + d, mask=d < width, other=0.0)
        total += h.to(tl.float32) * w.to(tl.float32)
    level = tl.sum(total, axis=0)
    if HAS_BIAS:
        level += tl.load(bias_ptr + target).to(tl.float32)
    tl.store(out_ptr + row, tl.where(inside, level, float("nan")))


def tile_shape(capped: bool, arch: str | int) -> dict[str, Any]:
    """Tile and launch options for a CUDA capability (80, 90 ...) or an AMD gfx name.

    The largest tiles that keep the epilogue in registers on every target.
    """
    tile = {"BLOCK_N": 128, "BLOCK_V": 64 if capped else 128, "num_warps": 8, "TMA": False}
    if not isinstance(arch, int):
        return tile | {"BLOCK_D": 64, "num_stages": 2}
    if arch < 90:
        return tile | {"BLOCK_D": 32, "num_stages": 4}
    tile |= {"BLOCK_V": 128, "BLOCK_D": 64, "num_stages": 4, "TMA": True}
    if arch < 100 and not capped:
        tile |= {"BLOCK_V": 256, "num_stages": 3}
    return tile


def chunk_of(vocab: int, block: int, processors: int) -> int:
    """Columns per program, in whole blocks: one program a processor where there are few rows.

    The same for many rows: a row's sums are formed in one order whatever the batch. There a program
    of fewer than four blocks would start too often for what it does.
    """
    return max(4, triton.cdiv(triton.cdiv(vocab, processors), block)) * block


def fits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can read both: 16-byte aligned rows, D a multiple of its blocks.

    And no row within another: the strides of a tensor map are documented for rows that lie apart.
    """
    return all(
        x.dtype in (torch.bfloat16, torch.float16)
        and x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        and x.shape[1] % 64 == 0
        and x.shape[0] < 2**31
        for x in (hidden, weight)
    )


def target_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    ignore_index: int,
) -> Tensor:
    """The targets' logits [N] in float32, NaN where there is none; for what `fits` accepts.

    One launch and no copies, where the CPU's `linear_designs.target_logits` gathers rows of
    weights a block at a time.
    """
    out = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    if hidden.shape[0] > 0:
        with on(hidden.device):
            target_logit_kernel[(hidden.shape[0],)](
                hidden,
                weight,
                weight if bias is None else bias.contiguous(),
                flat_ids(target_ids),
                out,
                hidden.stride(0),
                weight.stride(0),
                weight.shape[0],
                hidden.shape[1],
                ignore_index,
                HAS_BIAS=bias is not None,
                BLOCK=1024,
            )
    return out


def forward(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor | None,
    target_logits: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    **tuning: Any,
) -> Seven:
    """`linear_token_stats` of hidden [N, D] and weight [V, D] that `fits` accepts.

    target_logits [N] float32 are the targets' logits, NaN where there is none.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    out = empty_columns(hidden, torch.Size([rows]))
    if rows == 0:
        return out
    tile = tile_shape(softcap > 0, arch_of(hidden.device)) | tuning
    n, v, d = tile["BLOCK_N"], tile["BLOCK_V"], tile["BLOCK_D"]
    chunk = tile.pop("CHUNK", chunk_of(vocab, v, processors_of(hidden.device)))
    group = min(tile.pop("GROUP", GROUP), triton.cdiv(rows, n))
    partials = Partials(triton.cdiv(vocab, chunk), rows, hidden.device)
    operands: tuple[Any, Any] = (hidden, weight)
    if tile["TMA"]:
        operands = (
            TensorDescriptor.from_tensor(hidden, [n, d]),
            TensorDescriptor.from_tensor(weight, [v, d]),
        )
    if target_logits is not None:
        partials.level = target_logits
    with on(hidden.device):
        linear_partial_kernel[(group, partials.chunks, triton.cdiv(rows, n * group))](
            *operands,
            partials.level if bias is None else bias.contiguous(),
            partials.argmax if target_ids is None else flat_ids(target_ids),
            *partials.pointers(),
            hidden.stride(0),
            weight.stride(0),
            rows,
            vocab,
            hidden.shape[1],
            LOG2E / temperature,
            softcap,
            HAS_TARGET=target_ids is not None,
            HAS_BIAS=bias is not None,
            CAPPED=softcap > 0,
            CHUNK=chunk,
            **tile,
        )
    partials.finish(out, target_ids is not None, temperature, softcap)
    return out
