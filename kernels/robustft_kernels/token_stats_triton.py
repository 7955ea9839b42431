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
    flat_ids,
    on,
    results,
)
from robustft_kernels.reference import Options, Seven, empty_columns
from robustft_kernels.results import PartialTokenStats
from robustft_kernels.tiles_triton import absorb, edge_tile, far_sums, whole_tile
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
    xs, ahead = edge_tile(p, column, 0, head, length, level, target, HAS_TARGET, H)
    count += ahead
    c, y, m, s, w, second, best = absorb(xs, 0, rate, cap, c, y, m, s, w, second, best, CAPPED, H)

    # Whole tiles need no mask. Up to the target's tile a tie counts, from there on it does not.
    full = length // TILE
    split = tl.minimum(tl.maximum(target // TILE, 1), full)
    if HAS_TARGET:
        for tile in range(1, split):
            xs, ahead = whole_tile(p, column, tile, level, True, True, PAIRS, H)
            count += ahead
            c, y, m, s, w, second, best = absorb(
                xs, tile, rate, cap, c, y, m, s, w, second, best, CAPPED, H
            )
        for tile in range(split, full):
            xs, ahead = whole_tile(p, column, tile, level, False, True, PAIRS, H)
            count += ahead
            c, y, m, s, w, second, best = absorb(
                xs, tile, rate, cap, c, y, m, s, w, second, best, CAPPED, H
            )
        if (target // TILE >= 1) & (target // TILE < full):
            for h in tl.static_range(H):
                here = target // TILE * TILE + h * (R * G) + column
                x = tl.load(p + here, eviction_policy="evict_first").to(tl.float32)
                count += tl.sum(((x == level) & (here < target)).to(tl.int32), axis=1)
    else:
        for tile in range(1, full):
            xs, _ = whole_tile(p, column, tile, level, False, False, False, H)
            c, y, m, s, w, second, best = absorb(
                xs, tile, rate, cap, c, y, m, s, w, second, best, CAPPED, H
            )
    if (full >= 1) & (full < tiles):
        xs, ahead = edge_tile(p, column, full, 0, length, level, target, HAS_TARGET, H)
        count += ahead
        c, y, m, s, w, second, best = absorb(
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
        total, weighted = far_sums(p, column, tiles * H, head, length, highest, rate, cap, CAPPED)

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
