"""Cases for pytest-benchmark, to watch the kernels between commits: `pytest bench`.

The numbers that are published come from `robustft bench`, beside peers and the machine's limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from robustft_kernels import linear_token_stats, token_stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


def waiting(call: Callable[[], object]) -> Callable[[], object]:
    """The same call, finished when it returns."""

    def run() -> object:
        result = call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [49152, 128257])
def test_token_stats(benchmark: Any, dtype: torch.dtype, vocab: int) -> None:
    x = torch.randn(128, vocab, device=DEVICE).to(dtype)
    ids = torch.randint(vocab, (128,), device=DEVICE)
    benchmark(waiting(lambda: token_stats(x, ids)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(benchmark: Any, dtype: torch.dtype) -> None:
    x = torch.randn(64, 49152, device=DEVICE).to(dtype).requires_grad_()
    entropy = token_stats(x).entropy.sum()
    benchmark(waiting(lambda: torch.autograd.grad(entropy, x, retain_graph=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_token_stats(benchmark: Any, dtype: torch.dtype) -> None:
    hidden = torch.randn(256, 576, device=DEVICE).to(dtype)
    weight = torch.randn(49152, 576, device=DEVICE).to(dtype)
    ids = torch.randint(49152, (256,), device=DEVICE)
    benchmark(waiting(lambda: linear_token_stats(hidden, weight, ids)))
