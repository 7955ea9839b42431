"""Per-sequence reductions of token statistics over packed batches."""

from __future__ import annotations

import torch
from torch import Tensor

from robustft_kernels.results import SequenceStats, TokenStats


def is_integer(x: Tensor) -> bool:
    """Whether x holds integers; booleans are none."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


@torch.library.custom_op("robustft::checked_bounds", mutates_args=())
def checked_bounds(cu_seqlens: Tensor, n: int) -> Tensor:
    """The bounds as int64 that rise from 0 to n, or ValueError.

    An operator, so that a compiled graph does not break where the values are looked at.
    """
    ends = cu_seqlens.to(device="cpu", dtype=torch.int64)
    if ends[0] != 0 or ends[-1] != n or (ends.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to {n}, got {ends.numpy()}")
    return cu_seqlens.to(torch.int64, copy=True)


@checked_bounds.register_fake
def _(cu_seqlens: Tensor, n: int) -> Tensor:
    return torch.empty_like(cu_seqlens, dtype=torch.int64)


def reduce_sequences(
    stats: TokenStats, cu_seqlens: Tensor, target_ids: Tensor | None, ignore_index: int
) -> SequenceStats:
    """Reduce flat [N] statistics over the sequences [cu_seqlens[i], cu_seqlens[i+1]).

    Raises ValueError where the statistics are not flat, or `cu_seqlens` are not integers that rise
    from 0 to N.
    """
    n = stats.entropy.numel()
    if stats.entropy.dim() != 1:
        raise ValueError(
            "cu_seqlens needs packed positions [N], "
            f"got statistics shaped {tuple(stats.entropy.shape)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or not is_integer(cu_seqlens):
        raise ValueError(
            f"cu_seqlens must be integers [sequences + 1], got {cu_seqlens.dtype} "
            f"shaped {tuple(cu_seqlens.shape)}"
        )
    offsets = checked_bounds(cu_seqlens, n).to(stats.entropy.device)
    counted = torch.ones(n, dtype=torch.bool, device=stats.entropy.device)
    if target_ids is not None:
        counted = target_ids != ignore_index

    def segment(values: Tensor, how: str) -> Tensor:
        blank = -torch.inf if how == "max" else 0.0
        kept = torch.where(counted, values, torch.full_like(values, blank))
        return torch.segment_reduce(kept, how, offsets=offsets, initial=blank)

    tokens = segment(counted.to(torch.float64), "sum")
    none = torch.full_like(tokens, torch.nan)

    def mean(values: Tensor) -> Tensor:
        total = segment(values.to(torch.float64), "sum")
        return torch.where(tokens > 0, total / tokens, none).to(stats.entropy.dtype)

    peak = segment(stats.entropy, "max")
    return SequenceStats(
        tokens=tokens.to(torch.int64),
        nll=None if stats.logprob is None else mean(-stats.logprob),
        entropy=mean(stats.entropy),
        max_entropy=torch.where(tokens > 0, peak, none.to(peak.dtype)),
        margin=mean(stats.margin),
        rank=None if stats.rank is None else mean(stats.rank.to(stats.entropy.dtype)),
    )
