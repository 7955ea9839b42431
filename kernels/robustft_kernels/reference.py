"""Token statistics in plain PyTorch: what the kernels are held to, and run where none exists."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robustft_kernels.results import (
    PartialTokenStats,
    TokenStats,
    capped,
    finish,
    reshape,
)

# entropy, logprob, logsumexp, max_logprob, argmax, margin, rank
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# cotangents of entropy, logprob, logsumexp, max_logprob; None is zero
Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Options(NamedTuple):
    """How logits become a distribution, and which targets do not count."""

    temperature: float = 1.0
    softcap: float = 0.0  # 0: none
    ignore_index: int = -100


class Saved(NamedTuple):
    """What the backward pass needs of the forward one beside the logits, [...] each."""

    target_ids: Tensor | None
    entropy: Tensor
    max_logprob: Tensor
    argmax: Tensor


def partial_reference(
    x: Tensor,
    target_ids: Tensor | None,
    target_logits: Tensor | None,
    temperature: float,
    softcap: float,
) -> PartialTokenStats:
    """Readable sums over x [N, V] in x's own dtype (use float64); the kernels are held to it."""
    column = torch.arange(x.shape[1], device=x.device)
    top = x.masked_fill(x.isnan(), -torch.inf).max(1).values
    argmax = torch.where(x == top[:, None], column, x.shape[1]).min(1).values
    others = x.masked_fill(column == argmax[:, None], -torch.inf)
    origin = torch.where(top.isinf(), torch.zeros_like(top), top)
    d = (capped(x, softcap) - capped(origin, softcap)[:, None]) / temperature
    e = d.exp()
    rank = None
    if target_ids is not None and target_logits is not None:
        level = target_logits[:, None]
        rank = ((x > level) | ((x == level) & (column < target_ids[:, None]))).sum(1)
    return PartialTokenStats(
        max=top,
        second=others.max(1).values,
        sum_exp=e.sum(1),
        weighted=torch.where(e > 0, e * d, e).sum(1),
        argmax=argmax,
        target_logit=target_logits,
        rank=rank,
        temperature=temperature,
        softcap=softcap,
    )


def token_stats_reference(
    logits: Tensor,
    target_ids: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """`token_stats` in plain float64 PyTorch, several copies of the logits; not differentiable."""
    x = logits.detach().double().reshape(-1, logits.shape[-1])
    targets = level = None
    if target_ids is not None:
        targets = target_ids.reshape(-1)
        inside = (targets >= 0) & (targets < x.shape[1]) & (targets != ignore_index)
        level = x.gather(1, targets.where(inside, 0)[:, None])[:, 0]
        level = level.masked_fill(~inside, torch.nan)
    stats = finish(partial_reference(x, targets, level, temperature, softcap or 0.0))
    return reshape(stats, logits.shape[:-1])


def columns(stats: TokenStats) -> Seven:
    """The op's seven outputs; NaN and -1 stand for a missing target."""
    logprob, rank = stats.logprob, stats.rank
    if logprob is None or rank is None:
        logprob = torch.full_like(stats.entropy, torch.nan)
        rank = torch.full_like(stats.argmax, -1)
    return (
        stats.entropy,
        logprob,
        stats.logsumexp,
        stats.max_logprob,
        stats.argmax,
        stats.margin,
        rank,
    )


def empty_columns(like: Tensor, shape: torch.Size) -> Seven:
    """Uninitialised outputs on the device of `like`, float64 for a float64 one."""
    real = torch.float64 if like.dtype == torch.float64 else torch.float32
    a = torch.empty(shape, dtype=real, device=like.device)
    # A third of the time of another `empty`.
    b, c, d, e = (torch.empty_like(a) for _ in range(4))
    i, j = (torch.empty_like(a, dtype=torch.int64) for _ in range(2))
    return a, b, c, d, i, e, j


def check_range(target_ids: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError for a target [N] that is neither a column nor ignore_index."""
    wrong = (target_ids != ignore_index) & ((target_ids < 0) | (target_ids >= vocab))
    if wrong.any():
        where = int(wrong.nonzero()[0])
        raise ValueError(
            f"target_ids must be in [0, {vocab}) or ignore_index {ignore_index}, "
            f"got {int(target_ids[where])} at position {where}"
        )


def forward_by_reference(logits: Tensor, target_ids: Tensor | None, options: Options) -> Seven:
    """The reference, a few rows at a time, wherever no kernel exists."""
    shape = logits.shape[:-1]
    out = empty_columns(logits, shape)
    flat = [column.view(-1) for column in out]
    x = logits.reshape(-1, logits.shape[-1])
    targets = None if target_ids is None else target_ids.reshape(-1)
    if targets is not None and targets.device.type == "cpu":  # a GPU is not waited for
        check_range(targets, x.shape[1], options.ignore_index)
    step = max(1, (1 << 22) // x.shape[1])
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        stats = token_stats_reference(
            x[rows],
            None if targets is None else targets[rows],
            **options._asdict(),
        )
        for column, value in zip(flat, columns(stats), strict=True):
            column[rows] = value
    return out


def backward_by_reference(grads: Grads, logits: Tensor, saved: Saved, options: Options) -> Tensor:
    """d(loss)/d(logits) for cotangents of entropy, logprob, logsumexp and max_logprob [...].

    With p = softmax(z): dH/dz_j = -p_j (log p_j + H), dlogprob/dz_j = [j = t] - p_j,
    dlogsumexp/dz_j = p_j, dmax_logprob/dz_j = [j = argmax] - p_j. A row whose cotangents are all
    zero gets zeros, whatever it holds.
    """
    target_ids, entropy, max_logprob, argmax = saved
    temperature, softcap, ignore_index = options
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    vocab = logits.shape[-1]
    x_all, out_all = logits.reshape(-1, vocab), out.view(-1, vocab)
    column = torch.arange(vocab, device=logits.device)
    step = max(1, (1 << 22) // vocab)
    for start in range(0, x_all.shape[0], step):
        rows = slice(start, start + step)
        x = x_all[rows].double()
        zero = torch.zeros(x.shape[0], 1, dtype=torch.float64, device=x.device)
        g_entropy, g_logprob, g_logsumexp, g_top = (
            zero if g is None else g.reshape(-1)[rows, None].double() for g in grads
        )
        best = argmax.reshape(-1)[rows, None]
        if target_ids is None:
            target = torch.full_like(best, -1)
            g_logprob = zero
        else:
            target = target_ids.reshape(-1)[rows, None]
            g_logprob = torch.where(target == ignore_index, zero, g_logprob)
        z = capped(x, softcap) / temperature
        log_p = z - z.gather(1, best.clamp_min(0)) + max_logprob.reshape(-1)[rows, None].double()
        p = log_p.exp()
        h = entropy.reshape(-1)[rows, None].double()
        spread = p * (g_logsumexp - g_logprob - g_top - g_entropy * (log_p + h))
        g = torch.where(p == 0, zero, spread)
        g = g + (column == target) * g_logprob + (column == best) * g_top
        slope = torch.full_like(x, 1 / temperature)
        if softcap:
            bent = (1 - torch.tanh(x / softcap) ** 2) / temperature
            slope = torch.where(x.isinf(), slope, bent)
        idle = (g_entropy == 0) & (g_logprob == 0) & (g_logsumexp == 0) & (g_top == 0)
        out_all[rows] = torch.where(idle, zero, g * slope).to(out.dtype)
    return out
