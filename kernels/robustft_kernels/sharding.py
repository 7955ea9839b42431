"""Token statistics of a vocabulary that is split over devices (tensor parallelism)."""

from __future__ import annotations

import torch
from torch import Tensor

from robustft_kernels.reference import partial_reference
from robustft_kernels.results import PartialTokenStats, merge_partials, reshape_partial
from robustft_kernels.token_stats import (
    check_logits,
    check_options,
    check_targets,
    check_tensor,
    check_whole,
    flat_ids,
    kernels_of,
    rows_view,
    to_numpy,
)


def shard_target_logits(logits: Tensor, target_ids: Tensor, vocab_start: int = 0) -> Tensor:
    """This shard's share of the targets' logits: [...], -inf where another shard holds them.

    Reduce with `max` over the shards before `partial_token_stats`: no shard can rank a target
    whose logit it does not know. float32, float64 of float64 logits. Raises TypeError or ValueError
    where the targets are no integers shaped [...] or the logits no floats [..., V].
    """
    check_logits(logits, None)
    check_whole(vocab_start, "vocab_start")
    ids = check_targets(target_ids, logits.shape[:-1], logits.device)
    if ids is None:
        raise TypeError("target_ids must be a torch.Tensor, got None")
    local = ids - int(vocab_start)
    inside = (local >= 0) & (local < logits.shape[-1])
    found = logits.detach().gather(-1, local.where(inside, 0)[..., None])[..., 0]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return found.to(wide).masked_fill(~inside, -torch.inf)


def partial_token_stats(
    logits: Tensor,
    target_ids: Tensor | None = None,
    *,
    vocab_start: int = 0,
    target_logits: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> PartialTokenStats:
    """One shard's share of `token_stats`, for `TokenStats.merge`; not differentiable.

    On each rank::

        level = shard_target_logits(mine, target_ids, start)
        torch.distributed.all_reduce(level, torch.distributed.ReduceOp.MAX)
        part = partial_token_stats(mine, target_ids, vocab_start=start, target_logits=level)

    then gather the parts and merge them in the order of their columns.

    Args:
        logits: [..., columns of this shard], as for `token_stats`.
        target_ids: [...] over the whole vocabulary, or None. One that no shard holds is not found
            out: it comes out of the merge with log-probability -inf.
        vocab_start: the vocabulary's column that is this shard's first.
        target_logits: [...] the targets' logits; needed with target_ids, and only then.
        temperature: divides the (capped) logits.
        softcap: Gemma-2's cap; None for no cap.
        ignore_index: the target of positions that have none.

    Raises:
        TypeError, ValueError: as `token_stats`, and where only one of target_ids and
            target_logits is given.
    """
    check_logits(logits, None)
    check_whole(vocab_start, "vocab_start")
    check_whole(ignore_index, "ignore_index")
    target_ids = check_targets(target_ids, logits.shape[:-1], logits.device)
    cap = check_options(temperature, softcap)
    if (target_ids is None) != (target_logits is None):
        raise ValueError("target_ids and target_logits must be given together")
    shape, x = logits.shape[:-1], logits.detach()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    ids = level = None
    if target_ids is not None and target_logits is not None:
        check_tensor(target_logits, "target_logits")
        if target_logits.shape != shape:
            raise ValueError(
                f"target_logits must be shaped {tuple(shape)}, got {tuple(target_logits.shape)}"
            )
        ids = target_ids.reshape(-1)
        level = (
            target_logits.detach().reshape(-1).to(wide).masked_fill(ids == ignore_index, torch.nan)
        )
        ids = ids - int(vocab_start)
    core, launch = kernels_of(x)
    if core is not None:
        made = core.token_stats_partials(
            to_numpy(rows_view(x)),
            flat_ids(ids),
            None if level is None else level.numpy(),
            temperature,
            cap,
            torch.get_num_threads(),
        )
        top, second, total, weighted, argmax, rank = (torch.from_numpy(v) for v in made)
        part = PartialTokenStats(
            max=top,
            second=second,
            sum_exp=total,
            weighted=weighted,
            argmax=argmax,
            target_logit=level,
            rank=None if ids is None else rank,
            temperature=temperature,
            softcap=cap,
        )
    elif launch is not None:
        part = merge_partials(launch.chunk_partials(x, ids, level, temperature, cap))
    else:
        flat = x.reshape(-1, x.shape[-1]).to(wide)
        part = partial_reference(flat, ids, level, temperature, cap)
    return reshape_partial(part, shape, vocab_start)
