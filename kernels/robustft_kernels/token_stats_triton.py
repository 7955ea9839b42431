# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
"""Token statistics from logits on CUDA and ROCm: the Triton kernel and its launchers.

Imported only when a tensor on such a device asks for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustft_kernels.partials_triton import (
    LOG2E,
    NEAR,
    WARP,
    Partials,
    above,
    arch_of,
    capped,
    flat_ids,
    on,
    origin_of,
    results,
    weights,
)
from robustft_kernels.reference import Options, Seven, empty_columns
from robustft_kernels.results import PartialTokenStats
from robustft_kernels.token_stats import rows_view

# Columns per program. Fixed, so that a row's sums are formed in one order whatever else is in the
# batch; above all vocabularies in use, so that one launch is enough: a second one takes longer than
# what spreading a few rows over more processors would save.
CHUNK = 1 << 19


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
def _add_pairs(a, b):
    """Sums of bfloat16 pairs."""
    return tl.inline_asm_elementwise(
        "add.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _unpack(pair):
    """The two bfloat16 of a pair as float32."""
    low = (pair << 16).to(tl.float32, bitcast=True)
    return low, (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _whole_tile(
    p,
    column,  # [R, G] of a tile's first vectors
    tile,
    level,
    TIES: tl.constexpr,  # a logit equal to the target's is ahead of it, too
    HAS_TARGET: tl.constexpr,
    PAIRS: tl.constexpr,
    H: tl.constexpr,
):
    """Logits of a tile without blanks, H times [R, G] float32; how many of each thread's lead."""
    R: tl.constexpr = column.shape[0]
    G: tl.constexpr = column.shape[1]
    xs = ()
    if PAIRS:
        # Two columns at a time, 0.0 or 1.0 each: sums of H * G / 2 ones are exact.
        q = p.to(tl.pointer_type(tl.int32)) + tile * (H * R * G // 2)
        half = tl.arange(0, R)[:, None] * (G // 2) + tl.arange(0, G // 2)[None, :]
        bits = level.to(tl.int32, bitcast=True)
        bits = (bits & -65536) | ((bits >> 16) & 65535)
        compare: tl.constexpr = "set.ge.bf16x2.bf16x2" if TIES else "set.gt.bf16x2.bf16x2"
        leads = tl.zeros([R, G // 2], tl.int32)
        for h in tl.static_range(H):
            pairs = tl.load(q + h * (R * G // 2) + half, eviction_policy="evict_first")
            ahead = tl.inline_asm_elementwise(
                compare + " $0, $1, $2;", "=r,r,r", [pairs, bits], tl.int32, is_pure=True, pack=1
            )
            leads = ahead if h == 0 else _add_pairs(leads, ahead)
            low, high = _unpack(pairs)
            xs += (tl.reshape(tl.join(low, high), (R, G)),)
        low, high = _unpack(tl.reduce(leads, 1, _add_pairs))
        count = (low + high).to(tl.int32)
    else:
        leads = tl.zeros([R, G], tl.int32)
        for h in tl.static_range(H):
            x = tl.load(p + (tile * H + h) * (R * G) + column, eviction_policy="evict_first")
            x = x.to(tl.float32)
            if HAS_TARGET:
                leads += (x >= level if TIES else x > level).to(tl.int32)
            xs += (x,)
        count = tl.sum(leads, axis=1)
    return xs, count


@triton.jit
def _edge_tile(
    p,
    column,  # [R, G] of a tile's first vectors
    tile,
    head,
    length,
    level,
    target,
    HAS_TARGET: tl.constexpr,
    H: tl.constexpr,
):
    """The same of a tile that may be blank, -inf, outside [head, length).

    The mask is whole vectors, so that these loads are wide, too: they reach at most to the end of
    the 16 bytes that hold the row's last column.
    """
    R: tl.constexpr = column.shape[0]
    G: tl.constexpr = column.shape[1]
    xs = ()
    leads = tl.zeros([R, G], tl.int32)
    for h in tl.static_range(H):
        here = (tile * H + h) * (R * G) + column
        x = tl.load(p + here, mask=here // G * G < length, other=float("-inf")).to(tl.float32)
        within = (here >= head) & (here < length)
        x = tl.where(within, x, float("-inf"))
        if HAS_TARGET:
            ahead = (x > level) | ((x == level) & (here < target))
            leads += (ahead & within).to(tl.int32)
        xs += (x,)
    return xs, tl.sum(leads, axis=1)


@triton.jit
def _absorb(
    xs,  # H times [R, G] float32: H vectors of G columns for each of R threads
    tile,
    rate,
    cap,
    c,  # [R] origin of the sums: rate * y, rounded; base-2 units
    y,  # [R] largest capped logit so far of each thread
    m,  # [R] the same as given, without the cap
    s,  # [R] sum 2^(z - c)
    w,  # [R] sum 2^(z - c) (z - c), base-2 units
    second,  # [R] second largest vector maximum
    best,  # [R] vector in which m was met first: H * tile + its place in the tile
    CAPPED: tl.constexpr,
    H: tl.constexpr,
):
    """One rescaling per H vectors, all in registers of one thread.

    H tensors, not one with an axis for them: that may be spread over lanes, and which axis is
    depends on Triton's version (nine shuffles a tile, a quarter more instructions).
    """
    for h in tl.static_range(H):
        each = tl.max(xs[h], axis=1)
        second = tl.maximum(second, tl.minimum(m, each))
        best = tl.where(each > m, H * tile + h, best)
        m = tl.maximum(m, each)
    # From a finite origin -inf logits weigh nothing, +inf makes the sum +inf, and only a NaN logit
    # makes it NaN.
    if CAPPED:  # the values summed and their maximum come from one evaluation
        ys = ()
        for h in tl.static_range(H):
            ys += (capped(xs[h], cap, CAPPED),)
            y = tl.maximum(y, tl.max(ys[h], axis=1))
        xs = ys
    highest = y if CAPPED else m
    origin = origin_of(highest, rate)
    shift = tl.maximum(c - origin, -126.0)
    alpha = tl.exp2(shift)
    d, e = weights(xs[0], rate, origin[:, None])
    tile_s, tile_w = e, e * d
    for h in tl.static_range(1, H):
        d, e = weights(xs[h], rate, origin[:, None])
        tile_s += e
        tile_w += e * d
    w = alpha * (w + shift * s) + tl.sum(tile_w, axis=1)
    s = alpha * s + tl.sum(tile_s, axis=1)
    return origin, y, m, s, w, second, best


@triton.jit
def _far_sums(p, column, steps, head, length, highest, rate, cap, CAPPED: tl.constexpr):
    """The sums 2^d and 2^d d of a chunk with d = (y - highest) * rate, a vector at a time."""
    s = tl.zeros([column.shape[0]], tl.float32)
    w = tl.zeros([column.shape[0]], tl.float32)
    for step in range(0, steps):
        xs, _ = _edge_tile(p, column, step, head, length, 0.0, 0, False, 1)
        d = (capped(xs[0], cap, CAPPED) - highest) * rate
        d = tl.where(d < -126.0, -126.0, d)
        e = tl.exp2(d)
        s += tl.sum(e, axis=1)
        w += tl.sum(e * d, axis=1)
    return tl.sum(s, axis=0), tl.sum(w, axis=0)


# One compilation serves every number of rows, their strides and V: no load is wide for their sake.
@triton.jit(
    do_not_specialize=[
        "target_ptr",
        "base",
        "rows",
        "inner",
        "outer_stride",
        "inner_stride",
        "vocab",
        "ignore_index",
    ]
)
def partial_kernel(
    x_ptr,  # logits; 16-byte aligned
    target_ptr,  # [N] int64 columns, or a dummy
    # Outputs are partials or, if WHOLE, after the bar, results.
    of_target_ptr,  # [N] float32: the target's logit, NaN without one | logprob
    real0_ptr,  # [chunks, N] float32: max | entropy
    real1_ptr,  # second | logsumexp
    real2_ptr,  # sum | max_logprob
    real3_ptr,  # weighted | margin
    argmax_ptr,  # [chunks, N] int64
    rank_ptr,  # [chunks, N] int64
    base: tl.int64,  # elements from x_ptr to the first row
    rows,
    inner,  # row r starts at (r // inner) * outer_stride + (r % inner) * inner_stride
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    vocab,
    ignore_index: tl.int64,
    rate,  # log2(e) / temperature
    inverse,  # 1 / temperature
    cap,
    WHOLE: tl.constexpr,  # rows of one chunk: write results, not partials
    HAS_TARGET: tl.constexpr,
    GIVEN: tl.constexpr,  # the target's logit is input: another shard may hold the target
    CAPPED: tl.constexpr,
    CHUNK: tl.constexpr,
    H: tl.constexpr,  # vectors a thread takes from a tile
    R: tl.constexpr,  # threads
    G: tl.constexpr,  # columns of a vector: 16 bytes
    ALIGN: tl.constexpr,  # columns of a boundary, 16 or 128 bytes; x_ptr is on one
    PAIRS: tl.constexpr,  # bfloat16, counted two at a time
):
    """One chunk of one row.

    Loads are 128 bits wide and whole lines whatever the row's alignment: the base is moved down to
    a boundary and the columns before the chunk are blanked out.
    """
    chunks = tl.cdiv(vocab, CHUNK)
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    start = base + (row // inner).to(tl.int64) * outer_stride
    start += (row % inner).to(tl.int64) * inner_stride
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, vocab)
    aligned = (start + begin) // ALIGN * ALIGN
    head = (start + begin - aligned).to(tl.int32)  # blank columns in front
    length = head + end - begin
    p = x_ptr + aligned

    column = tl.arange(0, R)[:, None] * G + tl.arange(0, G)[None, :]  # [R, G], from `aligned`
    TILE: tl.constexpr = H * R * G
    tiles = tl.cdiv(length, TILE)

    level = float("nan")
    target = 0
    if HAS_TARGET:
        wanted = tl.load(target_ptr + row)
        if GIVEN:
            level = tl.load(of_target_ptr + row)
        else:
            inside = (wanted != ignore_index) & (wanted >= 0) & (wanted < vocab)
            wanted = tl.where(inside, wanted, 0)
            level = tl.load(x_ptr + start + wanted, mask=inside, other=float("nan"))
            level = level.to(tl.float32)
            if not WHOLE:  # noqa: SIM102 - one is decided at compile time
                if chunk == 0:
                    tl.store(of_target_ptr + row, level)
        # Columns of this chunk that win a tie against the target: [0, target).
        target = tl.minimum(tl.maximum(wanted - begin + head, 0), length).to(tl.int32)

    c = tl.full([R], -NEAR, tl.float32)
    y = tl.full([R], float("-inf"), tl.float32)
    m = tl.full([R], float("-inf"), tl.float32)
    second = tl.full([R], float("-inf"), tl.float32)
    s = tl.zeros([R], tl.float32)
    w = tl.zeros([R], tl.float32)
    best = tl.zeros([R], tl.int32)
    count = tl.zeros([R], tl.int32)

    # The first tile, blank in front and perhaps behind.
    xs, ahead = _edge_tile(p, column, 0, head, length, level, target, HAS_TARGET, H)
    count += ahead
    c, y, m, s, w, second, best = _absorb(xs, 0, rate, cap, c, y, m, s, w, second, best, CAPPED, H)

    # Whole tiles need no mask. Up to the target's tile a tie counts, from there on it does not.
    full = length // TILE
    split = tl.minimum(tl.maximum(target // TILE, 1), full)
    if HAS_TARGET:
        for tile in range(1, split):
            xs, ahead = _whole_tile(p, column, tile, level, True, True, PAIRS, H)
            count += ahead
            c, y, m, s, w, second, best = _absorb(
                xs, tile, rate, cap, c, y, m, s, w, second, best, CAPPED, H
            )
        for tile in range(split, full):
            xs, ahead = _whole_tile(p, column, tile, level, False, True, PAIRS, H)
            count += ahead
            c, y, m, s, w, second, best = _absorb(
                xs, tile, rate, cap, c, y, m, s, w, second, best, CAPPED, H
            )
        if (target // TILE >= 1) & (target // TILE < full):
            for h in tl.static_range(H):
                here = target // TILE * TILE + h * (R * G) + column
                x = tl.load(p + here, eviction_policy="evict_first").to(tl.float32)
                count += tl.sum(((x == level) & (here < target)).to(tl.int32), axis=1)
    else:
        for tile in range(1, full):
            xs, _ = _whole_tile(p, column, tile, level, False, False, False, H)
            c, y, m, s, w, second, best = _absorb(
                xs, tile, rate, cap, c, y, m, s, w, second, best, CAPPED, H
            )
    if (full >= 1) & (full < tiles):
        xs, ahead = _edge_tile(p, column, full, 0, length, level, target, HAS_TARGET, H)
        count += ahead
        c, y, m, s, w, second, best = _absorb(
            xs, full, rate, cap, c, y, m, s, w, second, best, CAPPED, H
        )

    # Across threads: the best group first, then sums relative to its maximum.
    first = (best * R + tl.arange(0, R)) * G
    top, first, runner_up = tl.reduce((m, first, second), 0, top_of)
    first = tl.maximum(first, head // G * G)  # where all are -inf, not the blanks in front
    # The sums' origins are rounded: the one of `top` may lie on either side of it.
    highest = tl.max(y, axis=0) if CAPPED else top
    shift = tl.maximum(tl.minimum(-above(highest, rate, c), 1.0), -126.0)
    shift = tl.where(tl.abs(top) == float("inf"), 0.0, shift)
    share = tl.exp2(shift)
    total, weighted, ranked = tl.reduce((share * s, share * (w + shift * s), count), 0, add3)
    if (tl.abs(highest) * rate > NEAR) & (tl.abs(top) != float("inf")):
        # No origin stands for such a maximum: sum again, now that it is known.
        total, weighted = _far_sums(p, column, tiles * H, head, length, highest, rate, cap, CAPPED)

    # Inside the best group: which column, and whether its second beats the other groups.
    here = first + tl.arange(0, G)
    x = tl.load(p + here, mask=(here >= head) & (here < length), other=float("-inf"))
    x = x.to(tl.float32)
    hit = (x == top) & (here >= head)
    at = tl.min(tl.where(hit, here, 2147483647), axis=0)
    others = tl.max(tl.where(here == at, float("-inf"), x), axis=0)
    runner_up = tl.maximum(runner_up, others)

    out = chunk.to(tl.int64) * rows + row
    best_column = (begin + at - head).to(tl.int64)
    weighted *= 0.6931471805599453
    if WHOLE:
        entropy, logprob, logsumexp, max_logprob, margin, best_column, rank = results(
            top,
            runner_up,
            total,
            weighted,
            best_column,
            ranked.to(tl.int64),
            level,
            inverse,
            cap,
            CAPPED,
        )
        tl.store(of_target_ptr + out, logprob)
        tl.store(real0_ptr + out, entropy)
        tl.store(real1_ptr + out, logsumexp)
        tl.store(real2_ptr + out, max_logprob)
        tl.store(real3_ptr + out, margin)
        tl.store(argmax_ptr + out, best_column)
        tl.store(rank_ptr + out, rank)
    else:
        tl.store(real0_ptr + out, top)
        tl.store(real1_ptr + out, runner_up)
        tl.store(real2_ptr + out, total)
        tl.store(real3_ptr + out, weighted)
        tl.store(argmax_ptr + out, best_column)
        if HAS_TARGET:
            tl.store(rank_ptr + out, ranked.to(tl.int64))


# ---- launchers ---------------------------------------------------------------------------------


def based_at(x: Tensor, boundary: int) -> tuple[Tensor, int]:
    """(storage of x from the last `boundary` bytes' boundary before it, elements in between).

    From the storage's start where that comes first.
    """
    offset = int(x.storage_offset())
    extra = min(x.data_ptr() % boundary // x.element_size(), offset)
    return torch.as_strided(x, (1,), (1,), offset - extra), extra


def on_boundary(x: Tensor) -> Tensor:
    """X, or a copy where its storage begins past the 16-byte boundary before its first element.

    So does that of a slice that came by DLPack, which knows no offset. No load is wide there, and
    pairs of columns would be read from addresses that are not theirs.
    """
    past = x.data_ptr() % 16 > x.storage_offset() * x.element_size()
    return x.contiguous().clone() if past else x


def aligned_base(x: Tensor) -> tuple[Tensor, int, int]:
    """`based_at` for the rows of x [outer, inner, V], and the elements of a boundary.

    Rows that all lie on 16-byte boundaries keep to those, so that no sum depends on where its row
    lies; others are read from boundaries of 128 bytes, which is faster.
    """
    size = x.element_size()
    odd = any(stride * size % 16 for stride in x.stride()[:2])
    boundary = 128 if odd and x.data_ptr() % 128 <= x.storage_offset() * size else 16
    return *based_at(x, boundary), boundary // size


def tile_shape(element_size: int, capped: bool, warp: int = WARP) -> dict[str, int]:
    """Tile and warps for the partial kernel: how many 128-bit loads a thread makes at a time.

    More spare instructions, of which 16-bit logits leave the fewest idle, and cost registers. On
    sm_90 a multiprocessor has so many warps, and bytes asked for, with Triton 3.6: bfloat16 takes
    10.9, 10.1 or 9.8 instructions a column at 2, 3 or 4 loads (36 warps with 36 KiB, 28 with 42, 20
    with 40), float32 14.3, 14.1 or 12.4 (64 with 64, 48 with 72, 48 with 96). Where tanh is due,
    loads are few beside the arithmetic.
    """
    threads = 64 * element_size
    return {
        "H": 1 if capped else {2: 3, 4: 4}[element_size],
        "R": threads,
        "G": 16 // element_size,
        "num_warps": threads // warp,
    }


def adds_pairs(x: Tensor) -> bool:
    """Whether the device has arithmetic on pairs of x's type."""
    arch = arch_of(x.device)
    return x.dtype == torch.bfloat16 and isinstance(arch, int) and arch >= 90


def _launch(
    x: Tensor,
    targets: Tensor | None,
    given: bool,
    options: Options,
    pointers: tuple[Tensor, ...],
    whole: bool,
    chunk: int,
    tuning: dict[str, int],
) -> None:
    """Run the kernel on x [outer, inner, V]; `pointers` are its outputs."""
    rows, vocab = x.shape[0] * x.shape[1], x.shape[2]
    base, extra, align = aligned_base(x)
    tile = tile_shape(x.element_size(), options.softcap > 0) | tuning
    with on(x.device):
        partial_kernel[(rows * triton.cdiv(vocab, chunk),)](
            base,
            pointers[-1] if targets is None else flat_ids(targets),
            *pointers,
            extra,
            rows,
            x.shape[1],
            x.stride(0),
            x.stride(1),
            vocab,
            options.ignore_index,
            LOG2E / options.temperature,
            1 / options.temperature,
            options.softcap,
            WHOLE=whole,
            HAS_TARGET=targets is not None,
            GIVEN=given,
            CAPPED=options.softcap > 0,
            CHUNK=chunk,
            ALIGN=align,
            PAIRS=targets is not None and not given and adds_pairs(x),
            **tile,
        )


def forward(logits: Tensor, target_ids: Tensor | None, options: Options, **tuning: int) -> Seven:
    """`token_stats` of logits [..., V] in float32, bfloat16 or float16."""
    x = on_boundary(rows_view(logits))
    chunk = tuning.pop("CHUNK", CHUNK)
    rows, chunks = x.shape[0] * x.shape[1], triton.cdiv(x.shape[2], chunk)
    out = empty_columns(logits, logits.shape[:-1])
    if rows == 0:
        return out
    if chunks == 1:
        entropy, logprob, logsumexp, max_logprob, argmax, margin, rank = out
        pointers = (logprob, entropy, logsumexp, max_logprob, margin, argmax, rank)
        _launch(x, target_ids, False, options, pointers, True, chunk, tuning)
    else:
        partials = Partials(chunks, rows, x.device)
        _launch(x, target_ids, False, options, partials.pointers(), False, chunk, tuning)
        partials.finish(out, target_ids is not None, options.temperature, options.softcap)
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
    x = on_boundary(rows_view(logits))
    chunk = tuning.pop("CHUNK", CHUNK)
    made = Partials(triton.cdiv(x.shape[2], chunk), x.shape[0] * x.shape[1], x.device)
    if level is not None:
        made.level = level.contiguous()
    if made.rows > 0:
        options = Options(temperature, softcap)
        _launch(x, targets, level is not None, options, made.pointers(), False, chunk, tuning)
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
