"""Token statistics from hidden states against logits made in float64."""

from __future__ import annotations

import pytest
import torch

from robustft_kernels import linear_token_stats
from robustft_kernels.reference import token_stats_reference


@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_logits_in_float64(with_bias: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 200, 16, dtype=torch.float64)
    weight = torch.randn(9001, 16, dtype=torch.float64)
    bias = torch.randn(9001, dtype=torch.float64) if with_bias else None
    target = torch.randint(9001, (3, 200))
    target[0, 0] = -100
    logits = hidden @ weight.T + (0 if bias is None else bias)
    found = linear_token_stats(
        hidden, weight, target, bias=bias, softcap=30.0, logit_scale=0.5, temperature=0.8
    )
    expected = token_stats_reference(logits * 0.5, target, softcap=30.0, temperature=0.8)
    for name in ("entropy", "logprob", "logsumexp", "max_logprob", "margin"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), atol=1e-12, rtol=1e-12, equal_nan=True
        )
    assert torch.equal(found.argmax, expected.argmax)
    assert torch.equal(found.rank, expected.rank)
