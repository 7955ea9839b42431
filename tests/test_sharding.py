"""Shards of a vocabulary merge to the whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustft_kernels import TokenStats, partial_token_stats, shard_target_logits, token_stats
from robustft_kernels.testing import KINDS, make_logits, violations

pytestmark = pytest.mark.filterwarnings("error")


def merged(
    x: torch.Tensor, t: torch.Tensor | None, cuts: list[int], **options: float
) -> TokenStats:
    bounds = [0, *sorted(cuts), x.shape[-1]]
    shards = [(a, x[..., a:b]) for a, b in itertools.pairwise(bounds) if b > a]
    level = None
    if t is not None:
        level = torch.stack([shard_target_logits(s, t, a) for a, s in shards]).max(0).values
    return TokenStats.merge(
        [
            partial_token_stats(s, t, vocab_start=a, target_logits=level, **options)
            for a, s in shards
        ]
    )


@given(
    st.sampled_from(KINDS),
    st.integers(2, 4000),
    st.lists(st.integers(1, 3999), max_size=5),
    st.sampled_from([None, 20.0]),
)
@settings(max_examples=40, deadline=None)
def test_merge_equals_the_whole(
    kind: str, vocab: int, cuts: list[int], softcap: float | None
) -> None:
    x = make_logits(kind, 4, vocab)
    t = torch.tensor([0, vocab - 1, vocab // 3, -100])
    whole = token_stats(x.double(), t, softcap=softcap)
    parts = merged(x, t, [cut % vocab for cut in cuts], softcap=softcap)
    assert not violations(parts, whole)
    assert merged(x, None, [vocab // 2]).rank is None


@pytest.mark.parametrize("where", [0, 5, 9])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_merge_at_the_edges(where: int, value: float) -> None:
    x = torch.randn(3, 10)
    x[0, where] = value
    x[1] = value
    t = torch.tensor([0, 3, 9])
    assert not violations(merged(x, t, [3, 6]), token_stats(x.double(), t))


@pytest.mark.parametrize("kind", ["low", "high", "spread"])
@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_merge_loses_nothing_at_any_temperature(
    kind: str, temperature: float, softcap: float | None
) -> None:
    x, t = make_logits(kind, 4, 3000), torch.tensor([0, 2999, 1000, -100])
    options = {"temperature": temperature, "softcap": softcap}
    whole = token_stats(x.double(), t, **options)
    assert not violations(merged(x, t, [700, 701, 2000], **options), whole)


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64"])
def test_targets_of_any_integer_dtype(name: str) -> None:
    x = torch.randn(3, 300)
    t = torch.tensor([100, 5, 127 if name == "int8" else 156])
    found, expected = merged(x, t.to(getattr(torch, name)), [90, 200]), token_stats(x, t)
    assert torch.equal(found.rank, expected.rank)
    torch.testing.assert_close(found.logprob, expected.logprob)


def test_target_logits_may_require_a_gradient() -> None:
    x, t = torch.randn(2, 4), torch.tensor([0, 1])
    level = x.gather(-1, t[:, None])[:, 0]
    part = partial_token_stats(x, t, target_logits=level.requires_grad_())
    assert torch.equal(part.rank, partial_token_stats(x, t, target_logits=level.detach()).rank)


def test_float64_merges_exactly() -> None:
    x = torch.randn(5, 2, 700, dtype=torch.float64) * 5
    t = torch.randint(700, (5, 2))
    whole, parts = token_stats(x, t), merged(x, t, [100, 300, 301])
    for name in ("entropy", "logprob", "logsumexp", "max_logprob", "margin"):
        torch.testing.assert_close(
            getattr(parts, name), getattr(whole, name), atol=1e-12, rtol=1e-13
        )


def test_bad_arguments() -> None:
    x, t = torch.randn(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="must be given together"):
        partial_token_stats(x, t)
    with pytest.raises(ValueError, match=r"target_logits must be shaped \(2,\)"):
        partial_token_stats(x, t, target_logits=torch.zeros(3))
    with pytest.raises(TypeError, match=r"target_logits must be a torch.Tensor, got list"):
        partial_token_stats(x, t, target_logits=[0.0, 0.0])
    with pytest.raises(TypeError, match=r"vocab_start must be a whole number, got 2\.5"):
        partial_token_stats(x, vocab_start=2.5)
    with pytest.raises(TypeError, match=r"vocab_start must be a whole number, got 2\.5"):
        shard_target_logits(x, t, 2.5)
    with pytest.raises(ValueError, match="at least one shard"):
        TokenStats.merge([])
    with pytest.raises(ValueError, match="share temperature"):
        TokenStats.merge([partial_token_stats(x), partial_token_stats(x, temperature=2.0)])


def test_a_start_of_another_kind_of_number() -> None:
    x, t = torch.randn(2, 5), torch.tensor([1, 3])
    level = shard_target_logits(x, t, True)  # a bool is an int
    assert level.tolist() == [x[0, 0].item(), x[1, 2].item()]
    part = partial_token_stats(x, t, vocab_start=True, target_logits=level)
    assert torch.equal(part.argmax, x.argmax(1) + 1)
    for call in (
        lambda: shard_target_logits(x, t, 2**63),
        lambda: partial_token_stats(x, vocab_start=-(2**63) - 1),
    ):
        with pytest.raises(ValueError, match="vocab_start must fit int64"):
            call()
