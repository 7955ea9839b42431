# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
"""What the Triton kernels share: the logit transform, chunk partials and their finish."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustft_kernels.reference import Seven

LOG2E = 1.4426950408889634
WARP = 64 if torch.version.hip else 32  # threads
# Origins of sums, in base-2 units, stay within: rounding moves them by 1/2 at most, far too little
# for 2^d to overflow. Logits beyond are summed from the maximum itself, the difference first.
NEAR = tl.constexpr(float(1 << 23))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _tanh(u):
    """About 2 ulp (Cephes tanhf): odd polynomial near zero, an exponential elsewhere."""
    size = tl.abs(u)
    size = tl.where(size > 9.1, 9.1, size)  # keeps NaN, as tl.minimum does not
    e = tl.exp2(size * -2.8853900817779268)
    far = (1.0 - e) / (1.0 + e)
    square = u * u
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    near = p * square * u + u
    return tl.where(size > 0.625, tl.where(u < 0.0, -far, far), near)


@triton.jit
def capped(x, cap, CAPPED: tl.constexpr):
    """Logits under the cap, cap * tanh(x / cap); infinite logits do not go through the cap."""
    if CAPPED:
        x = tl.where(tl.abs(x) == float("inf"), x, cap * _tanh(x * (1.0 / cap)))
    return x


@triton.jit
def above(y, rate, origin):
    """The difference y * rate - origin, rounded once."""
    if INTERPRETED:  # numpy has no fused multiply-add
        return (y.to(tl.float64) * rate - origin).to(tl.float32)
    return tl.fma(y, rate, -origin)


@triton.jit
def origin_of(highest, rate):
    """Where sums count from, in base-2 units; finite, too, as inf - inf would be NaN."""
    return tl.minimum(tl.maximum(highest * rate, -NEAR), NEAR)


@triton.jit
def weights(y, rate, origin):
    """(d, 2^d) for d = y * rate - origin; a NaN stays one, a masked column weighs 2^-126."""
    d = above(y, rate, origin)
    d = tl.where(d < -126.0, -126.0, d)
    return d, tl.exp2(d)


@triton.jit
def results(
    top,  # largest logit as given, the second largest
    second,
    s,  # sum e^(z - z(top)), sum e^(z - z(top)) (z - z(top))
    w,
    best,  # column of top
    place,  # rank of the target
    level,  # its logit, NaN without one
    rate,  # 1 / temperature
    cap,
    CAPPED: tl.constexpr,
):
    """(entropy, logprob, logsumexp, max_logprob, margin, argmax, rank) of whole rows."""
    is_nan = s != s
    defined = (s == s) & (tl.abs(top) != float("inf"))
    nan = float("nan")
    log_sum = tl.log(s)
    log_sum = tl.where(log_sum < 0.0, 0.0, log_sum)  # the maximum's own share is 1
    y_top = capped(top, cap, CAPPED)
    entropy = log_sum - w / s
    entropy = tl.where(entropy < 1e-30, 0.0, entropy)  # masked columns weigh 2^-126, not nothing
    entropy = tl.where(defined, entropy, nan)
    # Differences first: of two products one would be rounded and the other, fused, not.
    logprob = (capped(level, cap, CAPPED) - y_top) * rate - log_sum
    logprob = tl.where(defined, logprob, nan)
    logsumexp = tl.where(defined, y_top * rate + log_sum, tl.where(is_nan, nan, top))
    max_logprob = tl.where(defined, 0.0 - log_sum, nan)
    margin = tl.where(defined, (y_top - capped(second, cap, CAPPED)) * rate, nan)
    best = tl.where(is_nan, -1, best)
    place = tl.where(is_nan | (level != level), -1, place)
    return entropy, logprob, logsumexp, max_logprob, margin, best, place


@triton.jit(do_not_specialize=["rows", "chunks"])
def finish_kernel(
    max_ptr,  # [chunks, N] partials
    second_ptr,
    sum_ptr,
    weighted_ptr,
    argmax_ptr,
    rank_ptr,
    level_ptr,  # [N]
    entropy_ptr,  # [N] results
    logprob_ptr,
    logsumexp_ptr,
    max_logprob_ptr,
    margin_ptr,
    best_ptr,
    place_ptr,
    rows,
    chunks,
    rate,  # 1 / temperature
    cap,
    HAS_TARGET: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the chunks up in their order, then write the seven results."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    top = tl.load(max_ptr + row, mask=live, other=0.0)
    second = tl.load(second_ptr + row, mask=live, other=0.0)
    s = tl.load(sum_ptr + row, mask=live, other=1.0)
    w = tl.load(weighted_ptr + row, mask=live, other=0.0)
    best = tl.load(argmax_ptr + row, mask=live, other=0)
    place = tl.zeros([BLOCK], tl.int64)
    if HAS_TARGET:
        place = tl.load(rank_ptr + row, mask=live, other=0)
    at = row
    for _ in range(1, chunks):
        at += rows
        m = tl.load(max_ptr + at, mask=live, other=0.0)
        m_second = tl.load(second_ptr + at, mask=live, other=0.0)
        m_sum = tl.load(sum_ptr + at, mask=live, other=1.0)
        m_weighted = tl.load(weighted_ptr + at, mask=live, other=0.0)
        m_best = tl.load(argmax_ptr + at, mask=live, other=0)
        if HAS_TARGET:
            place += tl.load(rank_ptr + at, mask=live, other=0)
        new = tl.maximum(top, m)
        origin = capped(tl.where(tl.abs(new) == float("inf"), 0.0, new), cap, CAPPED)
        down = tl.maximum((capped(top, cap, CAPPED) - origin) * rate, -87.0)
        m_down = tl.maximum((capped(m, cap, CAPPED) - origin) * rate, -87.0)
        share, m_share = tl.exp(down), tl.exp(m_down)
        w = share * (w + down * s) + m_share * (m_weighted + m_down * m_sum)
        s = share * s + m_share * m_sum
        second = tl.maximum(tl.minimum(top, m), tl.maximum(second, m_second))
        best = tl.where(m > top, m_best, best)
        top = new

    level = tl.full([BLOCK], float("nan"), tl.float32)
    if HAS_TARGET:
        level = tl.load(level_ptr + row, mask=live, other=0.0)
    entropy, logprob, logsumexp, max_logprob, margin, best, place = results(
        top, second, s, w, best, place, level, rate, cap, CAPPED
    )
    tl.store(entropy_ptr + row, entropy, mask=live)
    tl.store(logprob_ptr + row, logprob, mask=live)
    tl.store(logsumexp_ptr + row, logsumexp, mask=live)
    tl.store(max_logprob_ptr + row, max_logprob, mask=live)
    tl.store(margin_ptr + row, margin, mask=live)
    tl.store(best_ptr + row, best, mask=live)
    tl.store(place_ptr + row, place, mask=live)


@functools.cache
def arch_of(device: torch.device) -> str | int:
    """A CUDA capability (80, 90 ...) or an AMD gfx name; the interpreter passes for sm_80."""
    if device.type != "cuda":
        return 80
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter passes for a small one."""
    if device.type != "cuda":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on(device: torch.device) -> Any:
    """Make `device` current for a launch; nothing to do under the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def flat_ids(target_ids: Tensor) -> Tensor:
    """Targets [...] as the kernels read them: [N] int64, in one piece."""
    return target_ids.reshape(-1).to(torch.int64).contiguous()


class Partials:
    """Uninitialised partial results [chunks, N] and the way from them to the outputs."""

    def __init__(self, chunks: int, rows: int, device: torch.device) -> None:
        self.chunks, self.rows, self.device = chunks, rows, device
        self.reals = torch.empty((4, chunks, rows), dtype=torch.float32, device=device)
        self.level = torch.empty(rows, dtype=torch.float32, device=device)
        self.argmax = torch.empty((chunks, rows), dtype=torch.int64, device=device)
        self.rank = torch.empty((chunks, rows), dtype=torch.int64, device=device)

    def pointers(self) -> tuple[Tensor, ...]:
        """level, max, second, sum, weighted, argmax, rank."""
        return (self.level, *self.reals.unbind(0), self.argmax, self.rank)

    def finish(self, out: Seven, has_target: bool, temperature: float, softcap: float) -> None:
        """Write the seven results from all chunks."""
        level, *rest = self.pointers()
        entropy, logprob, logsumexp, max_logprob, argmax, margin, rank = out
        if self.rows == 0:
            return
        with on(self.device):
            finish_kernel[(triton.cdiv(self.rows, 128),)](
                *rest,
                level,
                entropy,
                logprob,
                logsumexp,
                max_logprob,
                margin,
                argmax,
                rank,
                self.rows,
                self.chunks,
                1 / temperature,
                softcap,
                HAS_TARGET=has_target,
                CAPPED=softcap > 0,
                BLOCK=128,
            )
