# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
"""Token statistics from logits on CUDA and ROCm: the Triton kernel and its launchers.

Imported only when a tensor on such a device asks for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustft_kernels.partials_triton import LOG2E, Partials, on, scaled
from robustft_kernels.reference import Seven, empty_columns
from robustft_kernels.results import PartialTokenStats
from robustft_kernels.token_stats import rows_view

# Columns per program. Fixed, so that a row's sums are formed in one order whatever else is in the
# batch; small enough that one row still spreads over several processors.
CHUNK = 65536


@triton.jit
def top_of(m_a, start_a, second_a, m_b, start_b, second_b):
    """Combine (maximum, where its group starts, second) of two sets; ties to the lower start."""
    first = (m_a > m_b) | ((m_a == m_b) & (start_a < start_b))
    start = tl.where(first, start_a, start_b)
    second = tl.maximum(tl.minimum(m_a, m_b), tl.maximum(second_a, second_b))
    return tl.maximum(m_a, m_b), start, second


@triton.jit
def add3(a, b, c, x, y, z):
    """Three sums in one reduction."""
    return a + x, b + y, c + z


@triton.jit
def _absorb(
    x,  # [R, G] float32
    tile,
    rate,
    cap,
    m,  # [R] largest logit so far of each thread's groups, as given
    s,  # [R] sum 2^(z - z(m))
    w,  # [R] sum 2^(z - z(m)) (z - z(m)), base-2 units
    second,  # [R] second largest group maximum
    best,  # [R] tile in which m was met first
    CAPPED: tl.constexpr,
):
    """One rescaling per group of G columns, all in registers of one thread."""
    top = tl.max(x, axis=1)
    second = tl.maximum(second, tl.minimum(m, top))
    best = tl.where(top > m, tile, best)
    new = tl.maximum(m, top)
    # inf - inf would be NaN: with an infinite maximum count from zero instead. Then -inf logits
    # weigh nothing, +inf makes the sum +inf, and only a NaN logit makes it NaN.
    origin = tl.where(tl.abs(new) == float("inf"), 0.0, new)
    if CAPPED:
        z_origin = scaled(origin, rate, cap, CAPPED)
        shift = scaled(m, rate, cap, CAPPED) - z_origin
        d = scaled(x, rate, cap, CAPPED) - z_origin[:, None]
    else:
        shift = (m - origin) * rate
        d = (x - origin[:, None]) * rate
    shift = tl.maximum(shift, -126.0)
    alpha = tl.exp2(shift)
    d = tl.where(d < -126.0, -126.0, d)  # keeps NaN; 2^-126 is what a masked column weighs
    e = tl.exp2(d)
    w = alpha * (w + shift * s) + tl.sum(e * d, axis=1)
    s = alpha * s + tl.sum(e, axis=1)
    return new, s, w, second, best


@triton.jit
def partial_kernel(
    x_ptr,  # logits; 16-byte aligned
    target_ptr,  # [N] int64 columns, or a dummy
    level_ptr,  # [N] float32: the target's logit, NaN without one
    max_ptr,  # [chunks, N] float32, and so on down to rank_ptr
    second_ptr,
    sum_ptr,
    weighted_ptr,
    argmax_ptr,  # [chunks, N] int64
    rank_ptr,  # [chunks, N] int64
    base,  # elements from x_ptr to the first row
    rows,
    inner,  # row r starts at (r // inner) * outer_stride + (r % inner) * inner_stride
    outer_stride,
    inner_stride,
    vocab,
    ignore_index,
    rate,  # log2(e) / temperature
    cap,
    HAS_TARGET: tl.constexpr,
    GIVEN: tl.constexpr,  # level is input: another shard may hold the target
    CAPPED: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,  # groups per tile
    G: tl.constexpr,  # columns per group: 16 bytes
):
    """One chunk of one row.

    Loads are 128 bits wide whatever the row's alignment: the base is moved down to a 16-byte
    boundary and the columns before the chunk are blanked out.
    """
    chunks = tl.cdiv(vocab, CHUNK)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // chunks
    chunk = pid % chunks
    start = base + (row // inner) * outer_stride + (row % inner) * inner_stride
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, vocab)
    aligned = (start + begin) // G * G
    head = (start + begin - aligned).to(tl.int32)  # blank columns in front
    length = head + (end - begin).to(tl.int32)
    p = x_ptr + aligned

    column = tl.arange(0, R)[:, None] * G + tl.arange(0, G)[None, :]  # [R, G], from `aligned`
    group = tl.arange(0, R)[:, None] * G
    TILE: tl.constexpr = R * G
    tiles = tl.cdiv(length, TILE)

    level = float("nan")
    target = 0
    if HAS_TARGET:
        wanted = tl.load(target_ptr + row)
        if GIVEN:
            level = tl.load(level_ptr + row)
        else:
            inside = (wanted != ignore_index) & (wanted >= 0) & (wanted < vocab)
            wanted = tl.where(inside, wanted, 0)
            level = tl.load(x_ptr + start + wanted, mask=inside, other=float("nan"))
            level = level.to(tl.float32)
            if chunk == 0:
                tl.store(level_ptr + row, level)
        # Columns of this chunk that win a tie against the target: [0, target).
        target = tl.minimum(tl.maximum(wanted - begin + head, 0), length.to(tl.int64)).to(tl.int32)

    m = tl.full([R], float("-inf"), tl.float32)
    second = tl.full([R], float("-inf"), tl.float32)
    s = tl.zeros([R], tl.float32)
    w = tl.zeros([R], tl.float32)
    best = tl.zeros([R], tl.int32)
    count = tl.zeros([R], tl.int32)

    # The first tile, blank in front and perhaps behind.
    within = (column >= head) & (column < length)
    x = tl.load(p + column, mask=group < length, other=float("-inf")).to(tl.float32)
    x = tl.where(within, x, float("-inf"))
    if HAS_TARGET:
        ahead = (x > level) | ((x == level) & (column < target))
        count += tl.sum((ahead & within).to(tl.int32), axis=1)
    m, s, w, second, best = _absorb(x, 0, rate, cap, m, s, w, second, best, CAPPED)

    # Whole tiles need no mask. Up to the target's tile a tie counts, from there on it does not.
    full = length // TILE
    split = tl.minimum(tl.maximum(target // TILE, 1), full)
    if HAS_TARGET:
        for tile in range(1, split):
            x = tl.load(p + tile * TILE + column, eviction_policy="evict_first").to(tl.float32)
            count += tl.sum((x >= level).to(tl.int32), axis=1)
            m, s, w, second, best = _absorb(x, tile, rate, cap, m, s, w, second, best, CAPPED)
        for tile in range(split, full):
            x = tl.load(p + tile * TILE + column, eviction_policy="evict_first").to(tl.float32)
            count += tl.sum((x > level).to(tl.int32), axis=1)
            m, s, w, second, best = _absorb(x, tile, rate, cap, m, s, w, second, best, CAPPED)
        if (target // TILE >= 1) & (target // TILE < full):
            tile = target // TILE
            x = tl.load(p + tile * TILE + column, eviction_policy="evict_first").to(tl.float32)
            tie = (x == level) & (tile * TILE + column < target)
            count += tl.sum(tie.to(tl.int32), axis=1)
    else:
        for tile in range(1, full):
            x = tl.load(p + tile * TILE + column, eviction_policy="evict_first").to(tl.float32)
            m, s, w, second, best = _absorb(x, tile, rate, cap, m, s, w, second, best, CAPPED)

    # The last tile. The mask is whole groups, so that these loads stay wide too: they reach at
    # most to the end of the 16 bytes that hold the row's last column.
    if (full >= 1) & (full < tiles):
        here = full * TILE + column
        x = tl.load(p + here, mask=full * TILE + group < length, other=float("-inf"))
        x = tl.where(here < length, x.to(tl.float32), float("-inf"))
        if HAS_TARGET:
            ahead = (x > level) | ((x == level) & (here < target))
            count += tl.sum((ahead & (here < length)).to(tl.int32), axis=1)
        m, s, w, second, best = _absorb(x, full, rate, cap, m, s, w, second, best, CAPPED)

    # Across threads: the best group first, then sums relative to its maximum.
    first = best * TILE + tl.arange(0, R) * G
    top, first, runner_up = tl.reduce((m, first, second), 0, top_of)
    origin = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    if CAPPED:
        shift = scaled(m, rate, cap, CAPPED) - scaled(origin, rate, cap, CAPPED)
    else:
        shift = (m - origin) * rate
    shift = tl.maximum(shift, -126.0)
    share = tl.exp2(shift)
    total, weighted, ranked = tl.reduce((share * s, share * (w + shift * s), count), 0, add3)

    # Inside the best group: which column, and whether its second beats the other groups.
    here = first + tl.arange(0, G)
    x = tl.load(p + here, mask=(here >= head) & (here < length), other=float("-inf"))
    x = x.to(tl.float32)
    hit = (x == top) & (here >= head)
    at = tl.min(tl.where(hit, here, 2147483647), axis=0)
    others = tl.max(tl.where(here == at, float("-inf"), x), axis=0)
    runner_up = tl.maximum(runner_up, others)

    out = chunk * rows + row
    tl.store(max_ptr + out, top)
    tl.store(second_ptr + out, runner_up)
    tl.store(sum_ptr + out, total)
    tl.store(weighted_ptr + out, weighted * 0.6931471805599453)
    tl.store(argmax_ptr + out, begin + (at - head).to(tl.int64))
    if HAS_TARGET:
        tl.store(rank_ptr + out, ranked.to(tl.int64))


# ---- launchers ---------------------------------------------------------------------------------


def aligned_base(x: Tensor) -> tuple[Tensor, int]:
    """The storage of x from a 16-byte boundary at or before x, and the elements in between."""
    offset = int(x.storage_offset())
    extra = min(x.data_ptr() % 16 // x.element_size(), offset)
    flat = torch.as_strided(x, (1,), (1,), offset - extra)
    return flat, extra


def tile_shape(element_size: int, capped: bool) -> dict[str, int]:
    """Tile and warps for the partial kernel: two 128-bit loads a thread, one where tanh is due."""
    return {"R": 256 if capped else 512, "G": 16 // element_size, "num_warps": 8}


def launch_partials(
    logits: Tensor,
    targets: Tensor | None,
    level: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    **tuning: int,
) -> Partials:
    """Partials of logits [..., V] in float32, bfloat16 or float16; level None: look it up."""
    x = rows_view(logits)
    rows, vocab = x.shape[0] * x.shape[1], x.shape[2]
    chunk = tuning.pop("CHUNK", CHUNK)
    partials = Partials(triton.cdiv(vocab, chunk), rows, x.device)
    if rows == 0:
        return partials
    if level is not None:
        partials.level = level.contiguous()
    base, extra = aligned_base(x)
    with on(x.device):
        partial_kernel[(rows * partials.chunks,)](
            base,
            partials.argmax if targets is None else targets,
            *partials.pointers(),
            extra,
            rows,
            x.shape[1],
            x.stride(0),
            x.stride(1),
            vocab,
            ignore_index,
            LOG2E / temperature,
            softcap,
            HAS_TARGET=targets is not None,
            GIVEN=level is not None,
            CAPPED=softcap > 0,
            CHUNK=chunk,
            **(tile_shape(x.element_size(), softcap > 0) | tuning),
        )
    return partials


def forward(
    logits: Tensor,
    target_ids: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    **tuning: int,
) -> Seven:
    """`token_stats` of logits [..., V] in float32, bfloat16 or float16."""
    targets = None if target_ids is None else target_ids.reshape(-1).to(torch.int64)
    options = (temperature, softcap)
    partials = launch_partials(logits, targets, None, *options, ignore_index, **tuning)
    out = empty_columns(logits, logits.shape[:-1])
    partials.finish(out, targets is not None, *options)
    return out


def chunk_partials(
    logits: Tensor,
    targets: Tensor | None,
    level: Tensor | None,
    temperature: float,
    softcap: float,
    **tuning: int,
) -> list[PartialTokenStats]:
    """Mergeable partials, one a chunk; targets [N] may lie outside, level [N] is their logit."""
    made = launch_partials(logits, targets, level, temperature, softcap, -1, **tuning)
    top, second, total, weighted = made.reals.unbind(0)
    return [
        PartialTokenStats(
            max=top[i],
            second=second[i],
            sum_exp=total[i],
            weighted=weighted[i],
            argmax=made.argmax[i],
            target_logit=level,
            rank=None if targets is None else made.rank[i],
            temperature=temperature,
            softcap=softcap,
        )
        for i in range(made.chunks)
    ]
