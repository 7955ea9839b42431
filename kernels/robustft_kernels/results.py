"""What the token statistics return: per position, per sequence, and per shard of a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceStats:
    """Token statistics reduced over each packed sequence; every field is [sequences].

    Positions whose target is `ignore_index` do not count. A sequence without any counted
    position has `tokens` 0 and NaN elsewhere. All but `tokens` are in nats, float32 (float64 for
    float64 input).
    """

    tokens: Tensor  # int64, positions that count
    nll: Tensor | None  # mean negative log-likelihood, eq. 7 of the paper; None without targets
    entropy: Tensor  # mean Shannon entropy
    max_entropy: Tensor
    margin: Tensor  # mean top-1 minus top-2 log-probability
    rank: Tensor | None  # mean rank of the target, not in nats; None without targets


@dataclass(frozen=True)
class TokenStats:
    """Statistics of one next-token distribution per position; every field is shaped [...].

    Floats are nats in float32 (float64 for float64 input), ids are int64. Differentiable:
    `entropy`, `logprob`, `logsumexp`, `max_logprob`.

    Rules at the edges, the same on every device:

    * a logit of -inf has probability zero (under a soft cap too: it is a mask); with one finite
      logit entropy is 0 and margin +inf; a target at -inf has logprob -inf;
    * a row of -inf alone has no distribution: logsumexp -inf, argmax 0, other floats NaN;
    * a row with +inf: logsumexp +inf, argmax and rank as usual, other floats NaN;
    * a row with NaN: every float NaN, argmax and rank -1;
    * a target equal to `ignore_index`: logprob NaN, rank -1, the other fields as usual;
    * equal logits rank in the order of their columns, so `rank == 0` exactly where
      `argmax == target`; argmax and rank compare the logits as given, before the soft cap.
    """

    entropy: Tensor
    logprob: Tensor | None  # of the target; None without targets
    logsumexp: Tensor
    max_logprob: Tensor
    argmax: Tensor
    margin: Tensor  # top-1 minus top-2 log-probability
    rank: Tensor | None  # 0: the target is the model's first choice; None without targets
    sequences: SequenceStats | None = None  # with cu_seqlens

    @property
    def nll(self) -> Tensor | None:
        """Negative log-likelihood of the target [...], nats."""
        return None if self.logprob is None else -self.logprob

    @staticmethod
    def merge(partials: Sequence[PartialTokenStats]) -> TokenStats:
        """Statistics of the whole vocabulary from its shards, given in column order.

        Exact: the result differs from the unsharded one by rounding alone, at any number of
        shards, and does not depend on anything but the order given. Raises ValueError where there
        is no shard, or they differ in temperature, softcap or in having targets.
        """
        if not partials:
            raise ValueError("partials must hold at least one shard, got none")
        first = partials[0]
        for other in partials[1:]:
            if (other.temperature, other.softcap) != (first.temperature, first.softcap):
                raise ValueError("partials must share temperature and softcap")
            if (other.target_logit is None) != (first.target_logit is None):
                raise ValueError("partials must all have targets or none")
        return finish(merge_partials(partials))


@dataclass(frozen=True)
class PartialTokenStats:
    """One vocabulary shard's share, as mergeable sums; every tensor is shaped [...].

    With z(x) = softcap(x) / temperature: `sum_exp` = sum exp(z - z(max)) and
    `weighted` = sum exp(z - z(max)) (z - z(max)) over this shard's columns. `sum_exp` is NaN if
    the shard holds NaN, else +inf if it holds +inf.
    """

    max: Tensor  # largest logit as given
    second: Tensor  # second largest, -inf if there is none
    sum_exp: Tensor
    weighted: Tensor
    argmax: Tensor  # int64, counted over the whole vocabulary
    target_logit: Tensor | None  # NaN where there is no target
    rank: Tensor | None  # int64, this shard's columns that come before the target
    temperature: float
    softcap: float  # 0: none


def capped(x: Tensor, softcap: float) -> Tensor:
    """Logits under the soft cap (0: none); infinite ones do not go through it."""
    if softcap:
        x = torch.where(x.isinf(), x, softcap * torch.tanh(x / softcap))
    return x


def merge_partials(partials: Sequence[PartialTokenStats]) -> PartialTokenStats:
    """One partial for the columns of several, which are given in column order."""
    first = partials[0]
    if len(partials) == 1:
        return first
    maxima = torch.stack([p.max for p in partials])  # [shards, ...]
    top = maxima.max(0).values
    sums = torch.stack([p.sum_exp for p in partials])
    weighted = torch.stack([p.weighted for p in partials])
    # Differences first, here and below: quotients would be rounded, and their difference with them.
    shift = (capped(maxima, first.softcap) - capped(top, first.softcap)) / first.temperature
    # A shard of -inf weighs nothing; inf - inf and inf * 0 must not become NaN.
    shift = shift.masked_fill(maxima == top, 0.0).clamp_min(-1e4)
    share = shift.exp().masked_fill(maxima == -torch.inf, 0.0)
    # Where the best shard is, its own second competes; elsewhere the shard's maximum does.
    far = torch.iinfo(torch.int64).max
    argmax = torch.stack([p.argmax for p in partials]).masked_fill(maxima != top, far).min(0)
    is_best = torch.arange(len(partials), device=top.device).view(-1, *[1] * top.dim())
    seconds = torch.where(
        is_best == argmax.indices, torch.stack([p.second for p in partials]), maxima
    )
    ranks = [p.rank for p in partials if p.rank is not None]
    return PartialTokenStats(
        max=top,
        second=seconds.max(0).values,
        sum_exp=(share * sums).sum(0),
        weighted=(share * (weighted + shift * sums)).sum(0),
        argmax=argmax.values,
        target_logit=first.target_logit,
        rank=torch.stack(ranks).sum(0) if ranks else None,
        temperature=first.temperature,
        softcap=first.softcap,
    )


def finish(p: PartialTokenStats) -> TokenStats:
    """The statistics that a partial covering the whole vocabulary implies."""
    is_nan = p.sum_exp.isnan()
    defined = ~is_nan & p.max.isfinite()
    log_sum = p.sum_exp.log().clamp_min(0.0)  # the maximum's own share is 1
    entropy = log_sum - p.weighted / p.sum_exp
    # Kernels give masked columns the weight 2^-125, not zero: what they add is no entropy.
    entropy = torch.where(entropy < 1e-30, 0.0, entropy)
    top = capped(p.max, p.softcap)
    nan = torch.full_like(top, torch.nan)
    logprob = rank = None
    if p.target_logit is not None and p.rank is not None:
        above = (capped(p.target_logit, p.softcap) - top) / p.temperature
        logprob = torch.where(defined, above - log_sum, nan)
        rank = p.rank.masked_fill(is_nan | p.target_logit.isnan(), -1)
    return TokenStats(
        entropy=torch.where(defined, entropy, nan),
        logprob=logprob,
        logsumexp=torch.where(
            defined, top / p.temperature + log_sum, torch.where(is_nan, nan, p.max)
        ),
        max_logprob=torch.where(defined, -log_sum, nan),
        argmax=p.argmax.masked_fill(is_nan, -1),
        margin=torch.where(
            defined, (top - capped(p.second, p.softcap)) / p.temperature, nan
        ).detach(),
        rank=rank,
    )


def reshape(stats: TokenStats, shape: torch.Size) -> TokenStats:
    """The same statistics with every field in the given shape."""
    return TokenStats(
        entropy=stats.entropy.reshape(shape),
        logprob=None if stats.logprob is None else stats.logprob.reshape(shape),
        logsumexp=stats.logsumexp.reshape(shape),
        max_logprob=stats.max_logprob.reshape(shape),
        argmax=stats.argmax.reshape(shape),
        margin=stats.margin.reshape(shape),
        rank=None if stats.rank is None else stats.rank.reshape(shape),
    )


def reshape_partial(p: PartialTokenStats, shape: torch.Size, start: int) -> PartialTokenStats:
    """The same partial with every tensor in the given shape and argmax moved up by `start`."""
    return replace(
        p,
        max=p.max.reshape(shape),
        second=p.second.reshape(shape),
        sum_exp=p.sum_exp.reshape(shape),
        weighted=p.weighted.reshape(shape),
        argmax=p.argmax.reshape(shape) + start,
        target_logit=None if p.target_logit is None else p.target_logit.reshape(shape),
        rank=None if p.rank is None else p.rank.reshape(shape),
    )
