"""Inputs and the one tolerance table that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from robustft_kernels.reference import token_stats_reference
from robustft_kernels.results import TokenStats

KINDS = ("spread", "high", "low", "certain", "flat", "prefix", "single")


def make_logits(kind: str, rows: int, vocab: int, seed: int = 7) -> Tensor:
    """Logits [rows, vocab] float32 of a kind that has broken some implementation.

    "spread": randn * 4; "high" and "low": the same around 1e3 and -1e4; "certain": one column far
    above; "flat": nearly uniform; "prefix": -inf in the first two thirds; "single": one finite.
    """
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    if kind in ("spread", "high", "low"):
        return x * 4 + {"spread": 0.0, "high": 1e3, "low": -1e4}[kind]
    if kind == "certain":
        x[:, vocab // 2] = 60.0
        return x
    if kind == "flat":
        return x * 1e-3
    if kind == "prefix":
        x[:, : vocab - vocab // 3 - 1] = -torch.inf
        return x
    if kind == "single":
        x[:] = -torch.inf
        x[:, vocab // 3] = 2.5
        return x
    raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")


def violations(
    found: TokenStats, expected: TokenStats, absolute: float = 2e-6, relative: float = 1e-6
) -> list[str]:
    """What in `found` differs from the float64 `expected` by more than the table allows.

    entropy and max_logprob: `absolute`. logprob, logsumexp and margin, which are differences of
    scaled logits: `relative` times the largest of 1 and the logits' size. argmax and rank: equal.
    NaN and infinities must be in the same places.
    """
    problems = []
    size = torch.maximum(expected.logsumexp.abs(), expected.margin.abs())
    size = torch.where(size.isfinite(), size, torch.zeros_like(size)).double()
    for name in ("entropy", "logprob", "logsumexp", "max_logprob", "margin"):
        a, b = getattr(found, name), getattr(expected, name)
        if a is None or b is None or not b.numel():
            if a is not b and (a is None or b is None):
                problems.append(f"{name}: {'missing' if a is None else 'unexpected'}")
            continue
        narrow = b.to(a.dtype).double()  # past float32's range it is infinite
        a, b = a.to(b.device).double(), b.double()
        limit = torch.full_like(b, absolute)
        if name not in ("entropy", "max_logprob"):
            finite = torch.where(b.isfinite(), b.abs(), torch.zeros_like(b))
            limit = relative * torch.maximum(size, finite).clamp_min(1)
        same = (a == narrow) | (a.isnan() & b.isnan()) | ((a - b).abs() <= limit)
        if not same.all():
            where = int((~same).reshape(-1).nonzero()[0])
            got, want = a.reshape(-1)[where].item(), b.reshape(-1)[where].item()
            problems.append(f"{name} at {where}: expected {want!r}, got {got!r}")
    for name in ("argmax", "rank"):
        a, b = getattr(found, name), getattr(expected, name)
        if (a is None) != (b is None) or (a is not None and not torch.equal(a.to(b.device), b)):
            problems.append(f"{name}: differs")
    return problems


def spread_rows(count: int, rows: int, device: torch.device) -> Tensor:
    """Up to `count` of `rows` positions, evenly from the first to the last, int64."""
    return torch.linspace(0, rows - 1, min(count, rows), device=device, dtype=torch.float64).long()


def some_rows(stats: TokenStats, rows: Tensor) -> TokenStats:
    """The statistics of positions [N] at those `rows`."""
    columns: dict[str, Any] = {field.name: getattr(stats, field.name) for field in fields(stats)}
    columns = {name: None if x is None else x[rows] for name, x in columns.items()}
    return TokenStats(**columns)


def check_forward(
    found: TokenStats, logits: Tensor, target_ids: Tensor | None, **options: float
) -> None:
    """Raise AssertionError unless `found` is within the table of the float64 reference."""
    expected = token_stats_reference(logits, target_ids, **options)  # type: ignore[arg-type]
    problems = violations(found, expected)
    if problems:
        raise AssertionError("; ".join(problems))
