# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
"""What the logits kernel does with a tile: load it, count who is ahead of the target, add it up."""

from __future__ import annotations

import triton
import triton.language as tl

from robustft_kernels.partials_triton import capped, origin_of, weights


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
def whole_tile(
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
def edge_tile(
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
def absorb(
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
def far_sums(p, column, steps, head, length, highest, rate, cap, CAPPED: tl.constexpr):
    """The sums 2^d and 2^d d of a chunk with d = (y - highest) * rate, a vector at a time."""
    s = tl.zeros([column.shape[0]], tl.float32)
    w = tl.zeros([column.shape[0]], tl.float32)
    for step in range(0, steps):
        xs, _ = edge_tile(p, column, step, head, length, 0.0, 0, False, 1)
        d = (capped(xs[0], cap, CAPPED) - highest) * rate
        d = tl.where(d < -126.0, -126.0, d)
        e = tl.exp2(d)
        s += tl.sum(e, axis=1)
        w += tl.sum(e * d, axis=1)
    return tl.sum(s, axis=0), tl.sum(w, axis=0)
