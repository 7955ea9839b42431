# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
"""One output alone, with the tiles of the token statistics kernel: what the other six cost.

For the benchmark only: no -inf rows, no cap, no targets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustft_kernels.partials_triton import LOG2E
from robustft_kernels.token_stats_triton import CHUNK, aligned_base, tile_shape


@triton.jit
def logsumexp_kernel(
    x_ptr,  # logits; 16-byte aligned
    max_ptr,  # [chunks, N] float32
    sum_ptr,
    base,
    rows,
    stride,
    vocab,
    rate,  # log2(e)
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One chunk of one row."""
    chunks = tl.cdiv(vocab, CHUNK)
    pid = tl.program_id(0).to(tl.int64)
    row, chunk = pid // chunks, pid % chunks
    start = base + row * stride + chunk * CHUNK
    aligned = start // ALIGN * ALIGN
    head = (start - aligned).to(tl.int32)
    length = head + tl.minimum(CHUNK, vocab - chunk * CHUNK).to(tl.int32)
    column = tl.arange(0, R)[:, None] * G + tl.arange(0, G)[None, :]
    group = tl.arange(0, R)[:, None] * G
    TILE: tl.constexpr = R * G
    m = tl.full([R], -1e30, tl.float32)
    s = tl.zeros([R], tl.float32)
    full = length // TILE
    for tile in range(0, full):
        x = tl.load(x_ptr + aligned + tile * TILE + column, eviction_policy="evict_first")
        x = x.to(tl.float32)
        if tile == 0:
            x = tl.where(column >= head, x, -1e30)
        new = tl.maximum(m, tl.max(x, axis=1))
        s = s * tl.exp2((m - new) * rate) + tl.sum(tl.exp2((x - new[:, None]) * rate), axis=1)
        m = new
    here = full * TILE + column
    x = tl.load(x_ptr + aligned + here, mask=full * TILE + group < length, other=-1e30)
    x = tl.where((here < length) & (here >= head), x.to(tl.float32), -1e30)
    new = tl.maximum(m, tl.max(x, axis=1))
    s = s * tl.exp2((m - new) * rate) + tl.sum(tl.exp2((x - new[:, None]) * rate), axis=1)
    top = tl.max(new, axis=0)
    tl.store(max_ptr + chunk * rows + row, top)
    tl.store(sum_ptr + chunk * rows + row, tl.sum(s * tl.exp2((new - top) * rate), axis=0))


def logsumexp(x: Tensor) -> Tensor:
    """[N] float32 of logits [N, V] in float32, bfloat16 or float16."""
    rows, vocab = x.shape
    chunks = triton.cdiv(vocab, CHUNK)
    parts = torch.empty((2, chunks, rows), dtype=torch.float32, device=x.device)
    base, extra, align = aligned_base(x[None])
    tile = tile_shape(x.element_size(), capped=False)
    tile["R"] *= tile.pop("H")
    logsumexp_kernel[(rows * chunks,)](
        base,
        parts[0],
        parts[1],
        extra,
        rows,
        x.stride(0),
        vocab,
        LOG2E,
        CHUNK=CHUNK,
        ALIGN=align,
        **tile,
    )
    if chunks == 1:
        return parts[0, 0] + parts[1, 0].log()
    return torch.logsumexp(parts[0] + parts[1].log(), 0)
