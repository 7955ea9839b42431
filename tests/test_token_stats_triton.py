"""The GPU kernels of token statistics: under the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import pytest
import torch

from robustft_kernels import TokenStats, linear_token_stats, token_stats
from robustft_kernels.linear_designs import target_logits
from robustft_kernels.reference import (
    Options,
    Saved,
    backward_by_reference,
    token_stats_reference,
)
from robustft_kernels.testing import KINDS, check_forward, make_logits, violations

ON_GPU = torch.cuda.is_available()
if not ON_GPU and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
pytest.importorskip("triton")
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from robustft_kernels import (  # noqa: E402 - after the environment is set
    gradient_triton,
    linear_token_stats_triton,
    token_stats_triton,
)

DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter's numpy warns of the infinities that the kernels handle.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if ON_GPU:
    pytestmark.append(pytest.mark.gpu)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Small tiles and chunks reach every branch with few columns.
TILES = {"R": 16, "CHUNK": 1024}
# With logits of about 10, scaled ones are within 2^23, then past it, and past float32's integers.
FAR_TEMPERATURES = [1.0, 1e-6, 1e-8, 1e-10, 1e-30]


def forward(
    x: torch.Tensor,
    t: torch.Tensor | None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    **tiles: int,
) -> TokenStats:
    out = token_stats_triton.forward(x, t, Options(temperature, softcap), **(tiles or TILES))
    entropy, logprob, logsumexp, top, argmax, margin, rank = out
    if t is None:
        return TokenStats(entropy, None, logsumexp, top, argmax, margin, None)
    return TokenStats(entropy, logprob, logsumexp, top, argmax, margin, rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 127, 2777])
def test_against_float64(dtype: torch.dtype, vocab: int) -> None:
    x = torch.cat([make_logits(kind, 1, vocab) for kind in KINDS]).to(DEVICE, dtype)
    t = torch.tensor([vocab // 3, vocab - 1, 0, 0, -100, vocab // 2, vocab // 3], device=DEVICE)
    check_forward(forward(x, t), x, t)
    if vocab in (127, 2777):
        check_forward(forward(x, None), x, None)
        capped = forward(x, t, 0.7, 30.0)
        check_forward(capped, x, t, temperature=0.7, softcap=30.0)


class Recorder:
    """Runs a kernel and keeps what it was given."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.pointers, self.options = kernel, [], {}

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            self.pointers = [a.data_ptr() for a in arguments if isinstance(a, torch.Tensor)]
            self.options = options
            self.kernel[grid](*arguments, **options)

        return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [0, 1, 8])
def test_a_slice_that_came_without_its_offset(
    dtype: torch.dtype, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_logits("spread", 3, 300).to(DEVICE, dtype)
    x = torch.from_dlpack(whole[:, start:])
    assert x.storage_offset() == 0
    t = torch.tensor([7, -100, 290], device=DEVICE)
    kernel = Recorder(token_stats_triton.partial_kernel)
    monkeypatch.setattr(token_stats_triton, "partial_kernel", kernel)
    found = forward(x, t)
    check_forward(found, x, t)
    assert kernel.pointers[0] % 16 == 0
    # The gradient writes in place; whole groups of columns are read where they lie on boundaries.
    gradient = Recorder(gradient_triton.backward_kernel)
    monkeypatch.setattr(gradient_triton, "backward_kernel", gradient)
    saved = Saved(t, found.entropy, found.max_logprob, found.argmax)
    grads = tuple(torch.ones(3, device=DEVICE) for _ in range(4))
    expected = backward_by_reference(grads, x, saved, Options())
    gradient_triton.backward(grads, x, saved, Options(), x)
    torch.testing.assert_close(x, expected, rtol=torch.finfo(dtype).eps, atol=3e-6)
    assert (gradient.options["ALIGN"] > 1) == (gradient.pointers[0] % 16 == 0)


EDGES = [
    [1.0, math.nan, 2.0],
    [1.0, math.inf, 2.0],
    [math.inf, 1.0, math.inf],
    [math.inf, math.nan, 1.0],
    [-math.inf, math.inf, 1.0],
    [-math.inf] * 3,
    [-math.inf, math.nan, -math.inf],
    [2.0, 2.0, 2.0],
    [3e38, -3e38, 0.0],
]


@pytest.mark.parametrize("pad", [0, 1100])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_edges(pad: int, softcap: float) -> None:
    x = torch.full((len(EDGES), pad + 3), -math.inf, device=DEVICE)
    x[:, pad:] = torch.tensor(EDGES)
    t = torch.full((len(EDGES),), pad + 1, device=DEVICE)
    check_forward(forward(x, t, softcap=softcap), x, t, softcap=softcap)
    y = x.flip(1).contiguous()
    check_forward(forward(y, t - pad, softcap=softcap), y, t - pad, softcap=softcap)


def test_ties_everywhere() -> None:
    x = torch.randint(3, (6, 700), generator=torch.Generator().manual_seed(1)).to(DEVICE).float()
    t = torch.tensor([0, 1, 127, 128, 300, 699], device=DEVICE)
    check_forward(forward(x, t), x, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_alignment(dtype: torch.dtype) -> None:
    base = torch.randn(4, 3, 205, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    views = [base[..., 1:], base[:, :-1, 3:], base[1:, :, :-5], base.transpose(0, 1)]
    views += [base[..., ::2], base[0, 0], base[2:2]]
    for x in views:
        t = torch.randint(x.shape[-1], x.shape[:-1]).to(DEVICE)
        before = x.clone()
        check_forward(forward(x, t), x, t)
        assert torch.equal(x, before)


def test_poisoned_surroundings_do_not_leak() -> None:
    base = torch.full((3, 64), math.nan, device=DEVICE)
    base[:, 5:58] = torch.randn(3, 53).to(DEVICE)
    x, t = base[:, 5:58], torch.tensor([0, 52, 7], device=DEVICE)
    check_forward(forward(x, t), x, t)


def test_chunks_are_independent_of_the_batch() -> None:
    x = make_logits("spread", 5, 2500).to(DEVICE)
    t = torch.arange(5, device=DEVICE)
    together = forward(x, t)
    for i in range(5):
        alone = forward(x[i : i + 1], t[i : i + 1])
        for name in ("entropy", "logprob", "logsumexp", "rank"):
            assert torch.equal(getattr(together, name)[i], getattr(alone, name)[0])


def test_shards_through_the_kernel() -> None:
    x = make_logits("spread", 4, 900).to(DEVICE)
    t = torch.tensor([0, 400, 899, 500], device=DEVICE)
    level = x.gather(1, t[:, None])[:, 0]
    parts = []
    for start, end in ((0, 500), (500, 900)):
        made = token_stats_triton.chunk_partials(
            x[:, start:end], t - start, level, 1.0, 0.0, R=16, CHUNK=256
        )
        offset = start
        for i, part in enumerate(made):
            moved = {**vars(part), "argmax": part.argmax + offset}
            parts.append(type(part)(**moved))
            assert i < 2
    check_forward(TokenStats.merge(parts), x, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_gradient(dtype: torch.dtype, softcap: float) -> None:
    kinds = [kind for kind in KINDS if kind != "low"]
    x = torch.cat([make_logits(kind, 1, 5000) for kind in kinds]).to(DEVICE, dtype)
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates float32 to bfloat16 stores")
    t = torch.tensor([5, 1000, 4999, 0, -100, 1666], device=DEVICE)
    exact = token_stats_reference(x, t, softcap=softcap, temperature=0.8)
    generator = torch.Generator().manual_seed(2)
    grads = tuple(torch.randn(4, 6, generator=generator).to(DEVICE).unbind(0))
    options = Options(0.8, softcap)
    saved = Saved(t, exact.entropy, exact.max_logprob, exact.argmax)
    expected = backward_by_reference(grads, x.double(), saved, options)
    out = torch.full_like(x, math.nan)
    single = Saved(t, exact.entropy.float(), exact.max_logprob.float(), exact.argmax)
    gradient_triton.backward(grads, x, single, options, out)
    slack = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    error = (out.double() - expected).abs()
    assert (error <= slack * expected.abs() + 3e-6).all(), error.max()
    in_place = x.clone()
    gradient_triton.backward(grads, in_place, single, options, in_place)
    assert torch.equal(in_place, out)


# Columns of the buffer before a row and after it, for the logits and for the gradient.
LYING = {
    "aligned": ((0, 0), (0, 0)),
    "odd": ((0, 1), (0, 1)),
    "alike": ((5, 6), (5, 6)),
    "apart": ((1, 2), (2, 2)),
    "strides": ((0, 1), (0, 2)),
}


@pytest.mark.parametrize("vocab", [1, 2, 7, 8192, 8200, 9001])
@pytest.mark.parametrize("lying", LYING)
def test_gradient_wherever_rows_lie(vocab: int, lying: str) -> None:
    """Wide loads and stores reach the row's columns, all of them and no others."""

    def rows_in(around: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        before, after = around
        buffer = torch.full((2, 2, before + vocab + after), 7.0, device=DEVICE)
        return buffer, buffer[..., before : before + vocab]

    _, x = rows_in(LYING[lying][0])
    buffer, out = rows_in(LYING[lying][1])
    generator = torch.Generator().manual_seed(vocab)
    x.copy_(torch.randn(2, 2, vocab, generator=generator))
    x[1, 0] = math.nan  # its cotangents are zero
    t = torch.tensor([[0, vocab - 1], [0, vocab // 2]], device=DEVICE)
    grads = list(torch.randn(4, 2, 2, generator=generator).to(DEVICE).unbind(0))
    for g in grads:
        g[1, 0] = 0.0
    exact = token_stats_reference(x, t)
    saved = (exact.entropy.float(), exact.max_logprob.float(), exact.argmax)
    expected = backward_by_reference(tuple(grads), x, Saved(t, *saved), Options())
    gradient_triton.backward(tuple(grads), x, Saved(t, *saved), Options(), out)
    torch.testing.assert_close(out, expected, atol=3e-6, rtol=3e-6)
    assert not out[1, 0].any()
    out.fill_(7.0)
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fused_linear(softcap: float, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(37, 64, generator=generator).to(DEVICE, torch.float16)
    weight = (torch.randn(300, 64, generator=generator) / 4).to(DEVICE, torch.float16)
    bias = torch.randn(300, generator=generator).to(DEVICE, torch.float16) if with_bias else None
    t = torch.randint(300, (37,), generator=generator).to(DEVICE)
    t[3] = -100
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    level = logits.gather(1, t.clamp_min(0)[:, None])[:, 0].float()
    level[3] = math.nan
    small = {} if ON_GPU else {"CHUNK": 128, "BLOCK_N": 16, "BLOCK_V": 32, "BLOCK_D": 32}
    made = linear_token_stats_triton.forward(hidden, weight, t, level, bias, 0.7, softcap, **small)
    entropy, logprob, logsumexp, top, argmax, margin, rank = made
    found = TokenStats(entropy, logprob, logsumexp, top, argmax, margin, rank)
    expected = token_stats_reference(logits, t, temperature=0.7, softcap=softcap)
    assert not violations(found, expected, absolute=1e-5, relative=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("temperature", FAR_TEMPERATURES)
def test_fused_linear_too_large_for_an_origin(temperature: float, softcap: float) -> None:
    """Exact products: integers, so that float64 sees the same ties and differences."""
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randint(-2, 3, (16, 64), generator=generator).to(DEVICE, torch.float16)
    weight = torch.randint(-2, 3, (300, 64), generator=generator).to(DEVICE, torch.float16)
    # Logits around 2^23 / log2(e) and 2^24 / log2(e), some of them negative.
    weight[:, 0] = 2048.0
    hidden[:, 0] = 0.0
    hidden[0, 0], hidden[1, 0], hidden[2, 0] = 2840.0, 5400.0, -2840.0
    bias = torch.zeros(300, device=DEVICE)
    bias[:140] = bias[290:] = -1e30
    t = torch.randint(140, 290, (16,), generator=generator).to(DEVICE)
    logits = hidden.double() @ weight.double().T + bias.double()
    level = logits.gather(1, t[:, None])[:, 0].float()
    small = {} if ON_GPU else {"CHUNK": 128, "BLOCK_N": 16, "BLOCK_V": 32, "BLOCK_D": 32}
    made = linear_token_stats_triton.forward(
        hidden, weight, t, level, bias, temperature, softcap, **small
    )
    entropy, logprob, logsumexp, top, argmax, margin, rank = made
    found = TokenStats(entropy, logprob, logsumexp, top, argmax, margin, rank)
    expected = token_stats_reference(logits.float(), t, temperature=temperature, softcap=softcap)
    assert not violations(found, expected)


def test_fused_linear_rows_are_independent_of_the_batch() -> None:
    """Exact products, as a matrix library may add a single row up in another order."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randint(-2, 3, (40, 64), generator=generator).to(DEVICE, torch.float16)
    weight = torch.randint(-2, 3, (700, 64), generator=generator).to(DEVICE, torch.float16) / 32
    small = {} if ON_GPU else {"BLOCK_N": 16, "BLOCK_V": 32, "BLOCK_D": 32, "GROUP": 2}

    def rows(some: slice) -> list[torch.Tensor]:
        made = linear_token_stats_triton.forward(
            hidden[some], weight, None, None, None, 1.0, 0.0, **small
        )
        return [made[i] for i in (0, 2, 3, 4, 5)]

    together = rows(slice(None))
    for some in (slice(0, 1), slice(17, 39)):
        for column, alone in zip(together, rows(some), strict=True):
            assert torch.equal(column[some], alone)


@pytest.mark.parametrize("vocab", [32000, 49152, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize("processors", [108, 132, 304])
def test_fused_linear_keeps_processors_busy(vocab: int, processors: int) -> None:
    chunk = linear_token_stats_triton.chunk_of(vocab, 128, processors)
    assert chunk % 128 == 0
    assert -(-vocab // chunk) <= processors
    assert chunk == 4 * 128 or 0.6 * processors < -(-vocab // chunk)


def test_the_fused_kernel_is_offered_no_rows_within_others() -> None:
    weight = torch.zeros(10, 64, dtype=torch.float16)
    apart, one = torch.zeros(10, 128, dtype=torch.float16)[:, :64], weight[3]
    for rows, fit in ((apart, True), (one[None], True), (one.expand(10, 64), False)):
        assert linear_token_stats_triton.fits(rows, weight) == fit
    overlapping = torch.zeros(200, dtype=torch.float16).unfold(0, 64, 16)
    assert not linear_token_stats_triton.fits(overlapping, weight)


@pytest.mark.parametrize("with_bias", [False, True])
def test_target_logits_of_both_designs(with_bias: bool) -> None:
    hidden, weight = torch.randn(5, 192, device=DEVICE), torch.randn(50, 192, device=DEVICE)
    hidden, weight = hidden.to(torch.float16), weight.to(torch.float16)
    bias = torch.randn(50, device=DEVICE).to(torch.float16) if with_bias else None
    ids = torch.tensor([[3, 0], [-100, 0], [49, 0], [50, 0], [-1, 0]], device=DEVICE)[:, 0]
    found = linear_token_stats_triton.target_logits(hidden, weight, bias, ids, -100)
    expected = target_logits(hidden, weight, bias, ids, -100, torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5, equal_nan=True)
    assert found.isnan().tolist() == [False, True, False, True, True]


def test_strided_targets() -> None:
    """A column of a batch of ids, as `generate` hands it over, does not lie in one piece."""
    x = torch.randn(3, 40, device=DEVICE)
    ids = torch.tensor([[1, 7, 30], [2, 8, 31], [3, 9, 32]], device=DEVICE)
    check_forward(forward(x, ids[:, 1]), x, ids[:, 1].contiguous())
    grads = (torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE), None, None)
    entropy, _, _, top, argmax, _, _ = token_stats_triton.forward(x, None, Options())
    found, expected = torch.empty_like(x), torch.empty_like(x)
    for target, out in ((ids[:, 1], found), (ids[:, 1].contiguous(), expected)):
        gradient_triton.backward(grads, x, Saved(target, entropy, top, argmax), Options(), out)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tiles", [TILES, {"R": 32}], ids=["chunks", "whole"])
def test_logits_near_the_end_of_float32(tiles: dict[str, int]) -> None:
    """Masked with finfo.min, or larger than float32 holds once they are in base-2 units."""
    least = torch.finfo(torch.float32).min
    rows = [
        [least] * 1500,
        [least] * 700 + [1.0, 2.0, 3.0] * 200 + [least] * 200,
        [3.0e38] * 1500,
        [1.0, 2.0, 3.0e38, 3.2e38, 3.2e38] * 300,
        [-3.0e38, -3.1e38] * 750,
    ]
    x = torch.tensor(rows, device=DEVICE)
    t = torch.tensor([3, 701, 9, 2, 1], device=DEVICE)
    check_forward(forward(x, t, **tiles), x, t)


@pytest.mark.parametrize("tiles", [TILES, {"R": 32}], ids=["chunks", "whole"])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("temperature", FAR_TEMPERATURES)
def test_logits_too_large_for_an_origin(
    temperature: float, softcap: float, tiles: dict[str, int]
) -> None:
    """Where scaled logits are rounded by more than 2^d stands, differences come first."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8, 1500, generator=generator) * 6
    x.clamp_(max=20)
    x[:4, [5, 40, 1493]] = torch.tensor([23.0, 29.0, 37.0, 41.0])[:, None]  # ties for first
    x[4, 700] = 31.0
    x[5] = 1e30 + x[5] * 1e28
    # Integers around 2^23 / log2(e) and 2^24 / log2(e): sums of more than one term.
    x[6] = 5814539.0 + x[6].round()
    x[7] = 11.0e6 + x[7].round()
    x = x.to(DEVICE)
    t = torch.tensor([5, 40, 1493, 3, 700, 9, 11, 13], device=DEVICE)
    found = forward(x, t, temperature, softcap, **tiles)
    check_forward(found, x, t, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("mask", [-1e9, -1e15, -1e25, -1e30])
@pytest.mark.parametrize("temperature", [0.7, 0.8, 1.0])
def test_masked_with_a_large_number(mask: float, temperature: float) -> None:
    """Threads that have met nothing but masked columns."""
    x = make_logits("spread", 3, 1500).to(DEVICE)
    x[0, :1400] = x[1, 30:] = x[2, 300:1400] = mask
    t = torch.tensor([1450, 3, 700], device=DEVICE)
    check_forward(forward(x, t, temperature), x, t, temperature=temperature)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 127, 50257, 128256, 128257, 151936, 262144])
def test_public_on_gpu(dtype: torch.dtype, vocab: int) -> None:
    x = torch.cat([make_logits(kind, 1, vocab) for kind in KINDS]).to(DEVICE, dtype)
    t = torch.tensor([vocab // 3, vocab - 1, 0, 0, -100, vocab // 2, vocab // 3], device=DEVICE)
    check_forward(token_stats(x, t), x, t)
    y = x[:1].clone().requires_grad_()
    token_stats(y, t[:1]).entropy.sum().backward()
    assert y.grad is not None
    assert y.grad.isfinite().all()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("design", ["chunked", "fused"])
def test_linear_public_on_gpu(design: str) -> None:
    hidden = torch.randn(300, 256, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(33000, 256, device=DEVICE, dtype=torch.bfloat16) / 16
    t = torch.randint(33000, (300,), device=DEVICE)
    exact = token_stats_reference(hidden.double() @ weight.double().T, t)
    found = linear_token_stats(hidden, weight, t, design=design)
    assert not violations(found, exact, absolute=1e-4, relative=1e-4)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_more_elements_than_int32_on_gpu() -> None:
    x = torch.zeros(1, 128256, device=DEVICE, dtype=torch.bfloat16).expand(20000, -1).contiguous()
    x[-1, 77] = 5.0
    stats = token_stats(x)
    assert stats.argmax[-1] == 77
    assert (stats.entropy[:-1] - math.log(128256)).abs().max() < 1e-5
