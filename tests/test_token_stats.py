"""Token statistics from logits: every instruction set against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustft import _core
from robustft_kernels import TokenStats, TokenStatsLogitsProcessor, token_stats
from robustft_kernels.reference import token_stats_reference
from robustft_kernels.token_stats import native, to_numpy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIELDS = ("entropy", "logprob", "logsumexp", "max_logprob", "margin")


def assert_close(found: TokenStats, expected: TokenStats) -> None:
    """The tolerance table: entropy and max 2e-6, logprob and logsumexp 1e-6 * max(1, |z|)."""
    for name in FIELDS:
        a, b = getattr(found, name), getattr(expected, name)
        if a is None or b is None:
            assert a is b
            continue
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        limit = torch.full_like(b, 2e-6)
        if name in ("logprob", "logsumexp", "margin"):
            limit = 1e-6 * b.abs().clamp_min(1)
        if name == "logprob":  # the difference of two scaled logits and a logarithm
            limit = 1e-6 * (b.abs() + 1)
        assert (same | ((a - b).abs() <= limit)).all(), (name, (a - b).abs().max())
    assert torch.equal(found.argmax, expected.argmax)
    if expected.rank is not None:
        assert torch.equal(found.rank, expected.rank)


def run(x: torch.Tensor, t: torch.Tensor | None, isa: str, **options: float) -> TokenStats:
    made = _core.token_stats(
        to_numpy(x)[None],
        None if t is None else t.numpy(),
        options.get("temperature", 1.0),
        options.get("softcap", 0.0),
        -100,
        2,
        isa=isa,
    )
    entropy, logprob, logsumexp, top, argmax, margin, rank = map(torch.from_numpy, made)
    with_target = t is not None
    return TokenStats(
        entropy,
        logprob if with_target else None,
        logsumexp,
        top,
        argmax,
        margin,
        rank if with_target else None,
    )


def make(kind: str, n: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, vocab, generator=generator)
    if kind == "spread":
        return x * 4
    if kind == "high":
        return x * 4 + 1e3
    if kind == "low":
        return x * 4 - 1e4
    if kind == "certain":
        x[:, vocab // 2] = 60.0
        return x
    if kind == "flat":
        return x * 1e-3
    if kind == "prefix":
        x[:, : vocab - vocab // 3 - 1] = -torch.inf
        return x
    assert kind == "single"
    x[:] = -torch.inf
    x[:, vocab // 3] = 2.5
    return x


KINDS = ["spread", "high", "low", "certain", "flat", "prefix", "single"]


@pytest.mark.parametrize("isa", _core.token_stats_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_isa_against_float64(isa: str, dtype: torch.dtype, kind: str) -> None:
    for vocab in (1, 2, 127, 2048, 5003):
        x = make(kind, 4, vocab).to(dtype)
        t = torch.tensor([0, vocab // 3, vocab - 1, -100])
        assert_close(run(x, t, isa), token_stats_reference(x, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [50257, 128256, 128257, 151936, 262144])
def test_real_vocabularies(dtype: torch.dtype, vocab: int) -> None:
    for kind in KINDS:
        x = make(kind, 2, vocab).to(dtype)
        t = torch.tensor([vocab // 3, vocab - 1])
        assert_close(token_stats(x, t), token_stats_reference(x, t))


def test_core_is_built() -> None:
    assert native() is not None


@given(st.integers(1, 300), st.integers(0, 2**31 - 1), st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_shift_and_permutation(vocab: int, seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, vocab, generator=generator, dtype=torch.float64) * 3
    t = torch.randint(vocab, (3,), generator=generator)
    base = token_stats(x, t)
    moved = token_stats(x + shift, t)
    order = torch.randperm(vocab, generator=generator)
    place = torch.empty_like(order)
    place[order] = torch.arange(vocab)
    mixed = token_stats(x[:, order], place[t])
    for other in (moved, mixed):
        torch.testing.assert_close(other.entropy, base.entropy, atol=1e-11, rtol=0)
        torch.testing.assert_close(other.logprob, base.logprob, atol=1e-11, rtol=0)
        assert torch.equal(other.rank, base.rank)
    assert (base.entropy >= 0).all()
    assert (base.entropy <= math.log(vocab) + 1e-12).all()


def test_recorder_matches_teacher_forcing() -> None:
    torch.manual_seed(0)
    steps = torch.randn(4, 2, 50)
    prompt = torch.zeros(2, 3, dtype=torch.long)
    recorder = TokenStatsLogitsProcessor()
    ids = prompt
    for scores in steps:
        assert recorder(ids, scores) is scores
        ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1)], 1)
    nll, entropy = recorder.finish(ids)
    expected = token_stats(steps.transpose(0, 1), ids[:, 3:])
    assert torch.equal(nll, -expected.logprob)
    assert torch.equal(entropy, expected.entropy)
