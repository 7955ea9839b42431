"""Answer consistency on a GPU: pairwise agreement and its summary, as two Triton kernels.

A lane is one answer of one question. Lane a meets answer (a + offset) mod KP for every offset up to
KP / 2, so each pair is compared once. 64 positions of the lane's own answer stay in registers; each
token of the other answer is compared with all of them, which yields the match mask that the
bit-parallel recurrences need, without a table and without renumbering the vocabulary. Longer
answers take one such word after another: what an addition or shift carries out of a word waits in
memory for the next.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from robustft_kernels.partials_triton import WARP, on

METRICS = {"exact": 0, "token_f1": 1, "lcs": 2, "edit": 3}
_CARRY_BYTES = 256 << 20  # questions are taken in chunks so that the carries fit


@triton.jit
def _popcount(x):
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).to(tl.int32)


# One compilation serves every number of questions and answers and every length.
@triton.jit(do_not_specialize=["questions", "slots", "steps", "stride"])
def pairwise_kernel(
    tokens_ptr,  # [T] int32, not negative
    start_ptr,  # [N, K] int64, where in tokens an answer begins
    length_ptr,  # [N, K] int32, negative where there is no answer
    carry_ptr,  # [programs, L, LANES] int8, used when CARRY
    agreement_ptr,  # [N, K, K] float32
    questions,  # N
    slots,  # K
    steps,  # L, the longest answer
    stride,  # 1, unknown to the compiler: see `pattern` below
    METRIC: tl.constexpr,
    KP: tl.constexpr,  # K rounded up to a power of two
    LANES: tl.constexpr,  # a multiple of KP
    CARRY: tl.constexpr,  # L > 64
):
    """Compare every answer with every other answer to the same question."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)  # [LANES]
    question = program * (LANES // KP) + lane // KP
    a = lane % KP
    inside = (question < questions) & (a < slots)
    length_a = tl.load(length_ptr + question * slots + a, mask=inside, other=-1)
    # Positions of one pattern must lie in one thread, or every mask costs a shuffle tree; a visible
    # stride of 1 would spread them over the warp for the sake of a single load.
    start_a = tl.load(start_ptr + question * slots + a, mask=inside, other=0)
    pattern = tokens_ptr + start_a  # [LANES]
    half = tl.arange(0, 32)
    bit = (tl.full([32], 1, tl.int32) << half)[:, None]  # [32, 1]
    ones = tl.full([LANES], -1, tl.int64).to(tl.uint64, bitcast=True)
    nothing = tl.zeros([LANES], tl.uint64)
    carries = carry_ptr + program * steps * LANES + lane

    out_row = agreement_ptr + question * slots * slots
    tl.store(out_row + a * slots + a, tl.where(length_a >= 0, 1.0, 0.0), mask=inside)
    for offset in range(1, KP // 2 + 1):
        b = (a + offset) % KP
        both = inside & (b < slots)
        length_b = tl.load(length_ptr + question * slots + b, mask=both, other=-1)
        stream = tokens_ptr + tl.load(start_ptr + question * slots + b, mask=both, other=0)
        limit = tl.max(length_b, axis=0)
        count = tl.zeros([LANES], tl.int32)
        if METRIC == 0:
            same = length_a == length_b
            for step in range(0, limit):
                left = tl.load(pattern + step, mask=step < length_a, other=-1)
                right = tl.load(stream + step, mask=step < length_b, other=-1)
                same = same & (left == right)
            count = tl.where(same, length_a, 0)
        else:
            for word in range(0, (steps + 63) // 64):
                position = (word * 64 + half)[:, None] * stride  # [32, 1]
                place = pattern[None, :] + position  # [32, LANES]
                low = tl.load(place, mask=position < length_a[None, :], other=-1)
                high = tl.load(place + 32, mask=position + 32 < length_a[None, :], other=-1)
                plus = ones
                minus = nothing
                for step in range(0, limit):
                    active = step < length_b
                    token = tl.load(stream + step, mask=active, other=-2)[None, :]
                    low_bits = tl.sum(tl.where(low == token, bit, 0), axis=0)
                    high_bits = tl.sum(tl.where(high == token, bit, 0), axis=0)
                    match = (high_bits.to(tl.int64) << 32) | (low_bits.to(tl.int64) & 0xFFFFFFFF)
                    match = match.to(tl.uint64, bitcast=True)  # [LANES]
                    waiting = carries + tl.cast(step, tl.int64) * LANES
                    # The row above an edit matrix grows by one each step: H+ is 1 to begin with.
                    start: tl.constexpr = 2 if METRIC == 3 else 0
                    carry = tl.full([LANES], start, tl.int8)
                    if CARRY:
                        carry = tl.load(waiting, mask=(word > 0) & active, other=start)
                    carry = carry.to(tl.uint64)
                    if METRIC == 1:  # each occurrence takes one free position
                        match = tl.where(carry == 0, match & plus, nothing)
                        taken = match & (~match + 1)
                        plus = plus ^ taken
                        hit = taken != 0
                        count += hit.to(tl.int32)
                        out = carry | hit.to(tl.uint64)
                    elif METRIC == 2:  # Hyyrö 2004
                        used = plus & match
                        total = plus + used + carry
                        out = (used | (plus & ~total)) >> 63
                        plus = total | (plus - used)
                    else:  # Myers 1999, Hyyrö 2003
                        used = match & plus
                        total = used + plus + (carry & 1)
                        zero = (total ^ plus) | match | minus
                        up = minus | ~(zero | plus)
                        down = zero & plus
                        out = (used | (plus & ~total)) >> 63
                        out = out | ((up >> 63) << 1) | ((down >> 63) << 2)
                        up = (up << 1) | ((carry >> 1) & 1)
                        down = (down << 1) | (carry >> 2)
                        plus = tl.where(active, down | ~(zero | up), plus)
                        minus = tl.where(active, up & zero, minus)
                    if CARRY:
                        tl.store(waiting, out.to(tl.int8), mask=active)
                if CARRY:
                    tl.debug_barrier()  # the next word reads what this one stored
                if METRIC == 2:
                    count += _popcount(~plus)
                if METRIC == 3:
                    rest = tl.minimum(tl.maximum(length_a - word * 64, 0), 64)
                    # Two shifts, because one by 64 is undefined.
                    up_to = rest // 2
                    mask = ~((ones << up_to.to(tl.uint64)) << (rest - up_to).to(tl.uint64))
                    count += _popcount(plus & mask) - _popcount(minus & mask)
        if METRIC == 3:
            bound = tl.maximum(length_a, length_b)
            part = bound - length_b - count
        else:
            bound = length_a + length_b
            part = 2 * count
        safe = tl.maximum(bound, 1).to(tl.float32)
        value = tl.where(bound > 0, tl.div_rn(part.to(tl.float32), safe), 1.0)
        if METRIC == 0:
            value = tl.where(same, 1.0, 0.0)
        value = tl.where((length_a >= 0) & (length_b >= 0), value, 0.0)
        tl.store(out_row + a * slots + b, value, mask=both)
        tl.store(out_row + b * slots + a, value, mask=both)


@triton.jit(do_not_specialize=["slots"])
def summarise_kernel(
    agreement_ptr,  # [N, K, K] float32
    present_ptr,  # [N, K] int8
    weight_ptr,  # [N, K] float64, used when WEIGHTED
    mean_ptr,  # [N, K] float32
    cluster_ptr,  # [N, K] int64
    majority_ptr,  # [N] int64
    fraction_ptr,  # [N] float32
    entropy_ptr,  # [N] float32
    threshold,
    slots,  # K
    GREEDY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KP: tl.constexpr,  # K rounded up to a power of two
):
    """Cluster and count the votes of one question."""
    question = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, KP)
    here = tl.load(present_ptr + question * slots + row, mask=row < slots, other=0) != 0
    left = row[:, None]  # [KP, 1]
    right = row[None, :]  # [1, KP]
    pair = here[:, None] & here[None, :] & (left != right)
    place = agreement_ptr + question * slots * slots + left * slots + right
    value = tl.load(place, mask=pair, other=0.0)  # [KP, KP]
    others = tl.sum(here.to(tl.int32), axis=0) - 1
    mean = tl.where(
        here, tl.div_rn(tl.sum(value, axis=1), tl.maximum(others, 1).to(tl.float32)), 0.0
    )
    tl.store(mean_ptr + question * slots + row, mean, mask=row < slots)

    # Every label is kept twice, along the rows and along the columns of the tile.
    linked = pair & (value >= threshold)
    if GREEDY:
        by_row = tl.full([KP], -1, tl.int32)
        by_column = tl.full([KP], -1, tl.int32)
        count = 0
        for slot in range(0, slots):
            is_slot = row == slot
            opens = tl.sum((is_slot & here & (by_row < 0)).to(tl.int32), axis=0)
            to_row = tl.sum((linked & (right == slot)).to(tl.int32), axis=1) > 0
            to_column = tl.sum((linked & (left == slot)).to(tl.int32), axis=0) > 0
            later = row > slot
            by_row = tl.where((opens > 0) & (is_slot | (to_row & later)), count, by_row)
            by_column = tl.where((opens > 0) & (is_slot | (to_column & later)), count, by_column)
            count += opens
        cluster = by_row
    else:
        linked = linked | (here[:, None] & (left == right))
        by_row = tl.where(here, row, KP)
        by_column = by_row
        changed = 1
        while changed > 0:
            by_column = tl.min(tl.where(linked, by_row[:, None], KP), axis=0)
            lower = tl.min(tl.where(linked, by_column[None, :], KP), axis=1)
            changed = tl.sum((lower != by_row).to(tl.int32), axis=0)
            by_row = lower
        # A component is named by its first member; count the first members before it.
        before = (by_column[None, :] == right) & (right < by_row[:, None])
        cluster = tl.where(here, tl.sum(before.to(tl.int32), axis=1), -1)
    tl.store(cluster_ptr + question * slots + row, cluster.to(tl.int64), mask=row < slots)

    # In float64 and one after another, as the CPU adds them: which cluster is the heaviest may hang
    # on the last bit.
    share = tl.zeros([KP], tl.float64)
    total = tl.zeros([], tl.float64)
    for slot in range(0, slots):
        voter = row == slot
        voted = tl.sum(tl.where(voter & here, cluster, 0), axis=0)
        weight = tl.sum((voter & here).to(tl.float64), axis=0)
        if WEIGHTED:
            weight *= tl.load(weight_ptr + question * slots + slot)
        share += tl.where(row == voted, weight, 0.0)
        total += weight
    heaviest = tl.max(share, axis=0)
    majority = tl.min(tl.where(share == heaviest, row, KP), axis=0)
    safe = tl.where(total > 0, total, 1.0)
    fraction = (heaviest / safe).to(tl.float32)
    p = (share / safe).to(tl.float32)
    entropy = -tl.sum(tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0), axis=0)
    tl.store(majority_ptr + question, tl.where(total > 0, majority, -1).to(tl.int64))
    tl.store(fraction_ptr + question, fraction)
    tl.store(entropy_ptr + question, tl.maximum(entropy, 0.0))


def pairwise(
    tokens: torch.Tensor, start: torch.Tensor, length: torch.Tensor, metric: str
) -> torch.Tensor:
    """Agreement [N, K, K] float32; 0 where an answer is absent.

    tokens: [T] int32, not negative. start, length: [N, K] int64; slot [n, k] holds
    tokens[start : start + length], no answer if length < 0. metric: exact, token_f1, lcs or edit.
    """
    questions, slots = length.shape
    agreement = torch.empty((questions, slots, slots), dtype=torch.float32, device=tokens.device)
    if agreement.numel() == 0:
        return agreement
    steps = max(0, int(length.max()))
    padded = triton.next_power_of_2(slots)
    lanes = max(WARP, padded)
    together = lanes // padded
    carries = steps > 64 and metric != "exact"
    chunk = questions
    if carries:
        chunk = min(chunk, max(1, _CARRY_BYTES // (steps * lanes)) * together)
    carry = torch.empty(
        triton.cdiv(chunk, together) * steps * lanes if carries else 1,
        dtype=torch.int8,
        device=tokens.device,
    )
    for first in range(0, questions, chunk):
        some = slice(first, first + chunk)
        count = min(chunk, questions - first)
        with on(tokens.device):
            pairwise_kernel[(triton.cdiv(count, together),)](
                tokens,
                start[some],
                length[some].to(torch.int32),
                carry,
                agreement[some],
                count,
                slots,
                steps,
                1,
                METRIC=METRICS[metric],
                KP=padded,
                LANES=lanes,
                CARRY=carries,
                num_warps=lanes // WARP,
            )
    return agreement


def summarise(
    agreement: torch.Tensor,
    present: torch.Tensor,
    weights: torch.Tensor | None,
    threshold: float,
    clustering: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean_agreement, cluster, majority, majority_fraction, semantic_entropy); see Consistency."""
    questions, slots = present.shape
    mean = torch.empty((questions, slots), dtype=torch.float32, device=agreement.device)
    cluster = torch.empty((questions, slots), dtype=torch.int64, device=agreement.device)
    majority = torch.full((questions,), -1, dtype=torch.int64, device=agreement.device)
    fraction = torch.zeros(questions, dtype=torch.float32, device=agreement.device)
    entropy = torch.zeros_like(fraction)
    if present.numel():
        padded = triton.next_power_of_2(slots)
        votes = fraction if weights is None else weights
        with on(agreement.device):
            summarise_kernel[(questions,)](
                agreement.contiguous(),
                present.to(torch.int8).contiguous(),
                votes,
                mean,
                cluster,
                majority,
                fraction,
                entropy,
                threshold,
                slots,
                GREEDY=clustering == "greedy",
                WEIGHTED=weights is not None,
                KP=padded,
                num_warps=4 if padded > 32 else 1,
            )
    return mean, cluster, majority, fraction, entropy
