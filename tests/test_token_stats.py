"""Token statistics from logits: every instruction set, the edges, the gradient, PyTorch's rules."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustft import _core
from robustft_kernels import TokenStats, linear_token_stats, token_stats
from robustft_kernels import reference as reference_module
from robustft_kernels.reference import (
    Options,
    Saved,
    columns,
    forward_by_reference,
    token_stats_reference,
)
from robustft_kernels.testing import KINDS, check_forward, make_logits, violations
from robustft_kernels.token_stats import native, to_numpy, token_stats_op

pytestmark = pytest.mark.filterwarnings("error")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _core.token_stats_isas()
FLOAT_FIELDS = ("entropy", "logprob", "logsumexp", "max_logprob", "margin")


def on_isa(x: torch.Tensor, t: torch.Tensor | None, isa: str, **options: float) -> TokenStats:
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
    if t is None:
        return TokenStats(entropy, None, logsumexp, top, argmax, margin, None)
    return TokenStats(entropy, logprob, logsumexp, top, argmax, margin, rank)


def all_kinds(vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.cat([make_logits(kind, 3, vocab) for kind in KINDS]).to(dtype)
    t = torch.tensor([vocab // 3, vocab - 1, 0]).repeat(len(KINDS))
    t[-1] = -100
    return x, t


# ---- values ------------------------------------------------------------------------------------


def test_core_is_built() -> None:
    assert native() is not None
    assert ISAS[-1] == "portable"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 127, 2048, 5003])
def test_every_isa_against_float64(isa: str, dtype: torch.dtype, vocab: int) -> None:
    x, t = all_kinds(vocab, dtype)
    check_forward(on_isa(x, t, isa), x, t)
    check_forward(on_isa(x, None, isa), x, None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_and_temperature(isa: str, dtype: torch.dtype) -> None:
    x, t = all_kinds(1003, dtype)
    # Around -1e4 everything sits on the cap: still finite, still the same.
    found = on_isa(x, t, isa, softcap=30.0, temperature=0.7)
    check_forward(found, x, t, softcap=30.0, temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [50257, 128256, 128257, 151936, 262144])
def test_real_vocabularies(dtype: torch.dtype, vocab: int) -> None:
    x = torch.cat([make_logits(kind, 1, vocab) for kind in KINDS]).to(dtype)
    t = torch.tensor([vocab // 3, vocab - 1, 0, 5, -100, vocab - 7, vocab // 3])
    check_forward(token_stats(x, t), x, t)


def test_float64_stays_float64() -> None:
    x, t = all_kinds(301, torch.float64)
    found, expected = token_stats(x, t), token_stats_reference(x, t)
    for name in FLOAT_FIELDS:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-13, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_logits_count_whatever_the_caller_does_with_them(
    isa: str, dtype: torch.dtype
) -> None:
    size = 2e-5 if dtype == torch.float16 else 1e-39
    x = (torch.randn(3, 500, dtype=torch.float64) * size).to(dtype)
    t = torch.tensor([0, 7, 499])
    expected = token_stats_reference(x, t, temperature=max(size, 1e-30))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps subnormal numbers")
    try:
        found = on_isa(x, t, isa, temperature=max(size, 1e-30))
    finally:
        torch.set_flush_denormal(False)
    assert not violations(found, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_long_sums_do_not_drift(isa: str) -> None:
    # 262143 equal columns below one: an fp32 running sum would round each addition one way.
    x = torch.full((1, 262144), -8.3)
    x[0, 0] = 0.0
    target = torch.tensor([3])
    check_forward(on_isa(x, target, isa), x, target)


EDGES = {
    "nan": [1.0, math.nan, 2.0],
    "nan first": [math.nan, 1.0, 2.0],
    "inf": [1.0, math.inf, 2.0],
    "two inf": [math.inf, 1.0, math.inf],
    "inf and nan": [math.inf, math.nan, 1.0],
    "inf and -inf": [-math.inf, math.inf, 1.0],
    "-inf": [-math.inf] * 3,
    "-inf and nan": [-math.inf, math.nan, -math.inf],
    "all nan": [math.nan] * 3,
    "tied": [2.0, 2.0, 2.0],
    "zeros": [0.0, -0.0, 0.0],
    "huge": [3e38, -3e38, 0.0],
    "subnormal": [1e-44, 0.0, -1e-44],
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_edges(isa: str, edge: str, dtype: torch.dtype, softcap: float) -> None:
    for pad in (0, 1601):  # short rows, and edges in a late tile behind tiles of -inf
        x = torch.full((3, pad + 3), -math.inf, dtype=dtype)
        x[:, pad:] = torch.tensor(EDGES[edge]).to(dtype)
        t = torch.arange(pad, pad + 3)
        check_forward(on_isa(x, t, isa, softcap=softcap), x, t, softcap=softcap)
        x = x.flip(1).contiguous()
        check_forward(on_isa(x, t - pad, isa, softcap=softcap), x, t - pad, softcap=softcap)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rest", [-math.inf, math.nan])
def test_nan_in_tiles_before_the_first_finite_logit(
    isa: str, dtype: torch.dtype, rest: float
) -> None:
    x = make_logits("spread", 3, 6000).to(dtype)
    x[:, :4096] = rest
    x[0, 5] = x[1, 4095] = x[2, 4096] = math.nan
    found = on_isa(x, torch.tensor([5000, 0, 5999]), isa)
    assert found.entropy.isnan().all()
    assert (found.argmax == -1).all()
    assert (found.rank == -1).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("offset", [7e5, 8e5, -8e5, 1.6e7, 1e30])
def test_far_from_zero(isa: str, offset: float) -> None:
    # Where float32 cannot hold rate * max to less than the tolerance; then also within one row.
    x = make_logits("spread", 2, 3001) + offset
    t = torch.tensor([0, 3000])
    check_forward(on_isa(x, t, isa), x, t)
    x[:, :1500] -= offset
    check_forward(on_isa(x, t, isa), x, t)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_around_zero_and_among_negatives(isa: str, dtype: torch.dtype) -> None:
    values = torch.tensor([-0.0, 0.0, 1.0, -1.0, -1.5, 2.0**-14, -(2.0**-14)])
    order = torch.randint(7, (12, 1700), generator=torch.Generator().manual_seed(4))
    x = values[order].to(dtype)
    t = torch.arange(12) * 140
    check_forward(on_isa(x, t, isa), x, t)
    x = -1 - x.abs()
    check_forward(on_isa(x, t, isa), x, t)
    x[:, 5] = x[:, 1600] = -math.nan
    x[:, 7] = math.nan
    found = on_isa(x, t, isa)
    assert found.entropy.isnan().all()
    assert (found.rank == -1).all()


def test_documented_rules() -> None:
    inf, nan = math.inf, math.nan
    stats = token_stats(
        torch.tensor([[-inf, 1.0], [-inf, -inf], [inf, 0.0], [nan, 0.0]]), torch.tensor([0] * 4)
    )
    assert stats.entropy[0] == 0
    assert stats.margin[0] == inf
    assert stats.logprob[0] == -inf
    assert stats.logsumexp[1:3].tolist() == [-inf, inf]
    assert stats.argmax.tolist() == [1, 0, 0, -1]
    assert stats.rank.tolist() == [1, 0, 0, -1]
    for name in FLOAT_FIELDS:
        assert getattr(stats, name)[3].isnan()


def test_ties_rank_by_column() -> None:
    x = torch.zeros(5, 5)
    stats = token_stats(x, torch.arange(5))
    assert stats.rank.tolist() == [0, 1, 2, 3, 4]
    assert stats.argmax.tolist() == [0] * 5
    assert stats.margin.tolist() == [0.0] * 5


# ---- laws --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_depends_on_itself_alone(isa: str) -> None:
    x, t = all_kinds(6001, torch.float32)
    together = on_isa(x, t, isa)
    again = on_isa(x, t, isa)
    for i in range(len(x)):
        alone = on_isa(x[i : i + 1], t[i : i + 1], isa)
        for name in (*FLOAT_FIELDS, "argmax", "rank"):
            a, b, c = (getattr(s, name) for s in (together, alone, again))
            assert torch.equal(a[i : i + 1].nan_to_num(7), b.nan_to_num(7)), name
            assert torch.equal(a.nan_to_num(7), c.nan_to_num(7)), name


# ---- shapes, strides, arguments ----------------------------------------------------------------


def views() -> list[torch.Tensor]:
    torch.manual_seed(3)
    base = torch.randn(4, 6, 7, 50) * 3
    return [
        base[0, 0, 0],
        base[0, 0],
        base[0],
        base,
        base[:, :, :-1],
        base[:, ::2],
        base.transpose(0, 2),
        base[..., ::2],
        base[..., 3:],
        base.transpose(-1, -2),
        base[:1, :1, :1].expand(2, 3, 4, 50),
        base[:0],
    ]


@pytest.mark.parametrize("index", range(12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_shape_and_stride(index: int, dtype: torch.dtype) -> None:
    x = views()[index].to(dtype)
    before = x.clone()
    t = torch.randint(x.shape[-1], x.shape[:-1])
    check_forward(token_stats(x, t), x, t)
    assert torch.equal(x, before)


def test_vocab_size_hides_phantom_columns() -> None:
    x = torch.randn(3, 64)
    x[:, 50:] = math.nan
    t = torch.tensor([0, 49, 20])
    check_forward(token_stats(x, t, vocab_size=50), x[:, :50], t)
    y = x.clone().requires_grad_()
    token_stats(y, t, vocab_size=50).entropy.sum().backward()
    assert y.grad is not None
    assert (y.grad[:, 50:] == 0).all()
    assert y.grad[:, :50].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"logits": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "logits must be float32"),
        ({"logits": torch.ones(2, 0)}, ValueError, r"V >= 1, got \(2, 0\)"),
        ({"target_ids": torch.zeros(2)}, TypeError, "target_ids must be integers"),
        (
            {"target_ids": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"shaped \(2,\), got \(3,\)",
        ),
        ({"target_ids": torch.tensor([0, 3])}, ValueError, r"\[0, 3\) .* got 3 at position 1"),
        ({"target_ids": torch.tensor([-1, 0])}, ValueError, "got -1 at position 0"),
        ({"temperature": 0.0}, ValueError, r"temperature must be in \[1e-30, 1e30\], got 0"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": 1e-39}, ValueError, "temperature must be in"),
        ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
        ({"softcap": "30"}, TypeError, "softcap must be a number, got str"),
        ({"softcap": -1.0}, ValueError, r"softcap must be in \[1e-30, 1e30\], got -1"),
        ({"softcap": 4e38}, ValueError, "softcap must be in"),
        ({"vocab_size": 4}, ValueError, r"vocab_size must be in \[1, 3\], got 4"),
        ({"vocab_size": 2.0}, TypeError, "vocab_size must be a whole number, got 2.0"),
        ({"ignore_index": None}, TypeError, "ignore_index must be a whole number, got None"),
        ({"cu_seqlens": torch.tensor([0, 1])}, ValueError, r"rise from 0 to 2, got \[0 1\]"),
        ({"cu_seqlens": torch.arange(9999)}, ValueError, r"\[ *0 +1 +2 \.\.\. .* 9998\]$"),
        ({"cu_seqlens": torch.tensor([0.0, 2.0])}, ValueError, "must be integers"),
        ({"cu_seqlens": torch.tensor([0, 2 + 0j])}, ValueError, "must be integers"),
        ({"cu_seqlens": torch.tensor([False, True])}, ValueError, "must be integers"),
        ({"cu_seqlens": [0, 2]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        token_stats(**({"logits": torch.randn(2, 3)} | arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["temperature", "softcap"])
@pytest.mark.parametrize("value", [1e-30, 1e30])
def test_the_farthest_options(dtype: torch.dtype, option: str, value: float) -> None:
    stats = token_stats(torch.randn(3, 50).to(dtype), torch.arange(3), **{option: value})
    for name in ("entropy", "logprob", "logsumexp", "max_logprob"):
        assert not getattr(stats, name).isnan().any(), name
    assert (stats.argmax >= 0).all()


INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_targets_of_any_integer_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(3, 300)
    t = torch.tensor([100, 5, 127 if dtype == torch.int8 else 156])  # 156 is -100 in eight bits
    found, expected = token_stats(x, t.to(dtype)), token_stats(x, t)
    assert torch.equal(found.logprob, expected.logprob)
    assert torch.equal(found.rank, expected.rank)
    ends = torch.tensor([0, 3])
    assert token_stats(x, t.to(dtype), cu_seqlens=ends).sequences.tokens.tolist() == [3]


def test_fallback_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = all_kinds(77, torch.bfloat16)
    direct = token_stats(x, t)
    native_columns = columns(direct)
    for a, b in zip(forward_by_reference(x, t, Options()), native_columns, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-6, equal_nan=True)
    with pytest.raises(ValueError, match="got 77 at position 1"):
        reference_module.forward_by_reference(x[:2], torch.tensor([0, 77]), Options())


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys, robustft_kernels, robustft; "
        "bad = {'transformers', 'peft', 'triton.language', 'datasets'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- sequences ---------------------------------------------------------------------------------


def test_sequences() -> None:
    x = torch.randn(9, 20)
    t = torch.randint(20, (9,))
    t[[2, 5]] = -100
    ends = torch.tensor([0, 3, 3, 6, 9], dtype=torch.int32)
    stats = token_stats(x, t, cu_seqlens=ends)
    found = stats.sequences
    assert found is not None
    assert found.tokens.tolist() == [2, 0, 2, 3]
    for i, rows in enumerate([[0, 1], [], [3, 4], [6, 7, 8]]):
        for name in ("nll", "entropy", "margin", "rank"):
            expected = getattr(stats, name)[rows].double().mean()
            torch.testing.assert_close(
                getattr(found, name)[i].double(), expected, atol=1e-6, rtol=1e-6, equal_nan=True
            )
        peak = stats.entropy[rows].max() if rows else torch.tensor(math.nan)
        torch.testing.assert_close(found.max_entropy[i], peak, equal_nan=True)
    alone = token_stats(x, cu_seqlens=ends).sequences
    assert alone is not None
    assert alone.nll is None
    assert alone.tokens.tolist() == [3, 0, 3, 3]


def test_sequences_are_differentiable() -> None:
    x = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([1, 2, -100, 3, 4, 5])

    def reduced(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        s = token_stats(y, t, cu_seqlens=torch.tensor([0, 3, 6])).sequences
        return s.nll, s.entropy, s.max_entropy

    assert torch.autograd.gradcheck(reduced, (x,))


# ---- gradient and PyTorch ----------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap: float | None) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0, 3, 6, -100])

    def outputs(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        s = token_stats(y, t, temperature=0.7, softcap=softcap)
        return s.entropy, s.logprob[:3], s.logsumexp, s.max_logprob

    assert torch.autograd.gradcheck(outputs, (x,))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_gradient_on_every_isa(isa: str, dtype: torch.dtype, softcap: float) -> None:
    x = torch.cat([make_logits(kind, 1, 3001) for kind in KINDS if kind != "low"]).to(dtype)
    n = len(x)
    t = torch.tensor([5, 1000, 3000, 0, -100, 1000])
    forward = on_isa(x, t, isa, softcap=softcap, temperature=0.8)
    grads = tuple(torch.randn(4, n, generator=torch.Generator().manual_seed(2)).unbind(0))
    out = torch.full_like(x, math.nan)
    _core.token_stats_backward(
        to_numpy(x)[None],
        t.numpy(),
        0.8,
        softcap,
        -100,
        2,
        tuple(g.numpy() for g in grads),
        (forward.entropy.numpy(), forward.max_logprob.numpy()),
        forward.argmax.numpy(),
        to_numpy(out)[None],
        isa=isa,
    )
    exact = token_stats_reference(x, t, softcap=softcap, temperature=0.8)
    expected = reference_module.backward_by_reference(
        grads,
        x.double(),
        Saved(t, exact.entropy, exact.max_logprob, exact.argmax),
        Options(0.8, softcap),
    )
    slack = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    error = (out.double() - expected).abs()
    assert (error <= slack * expected.abs() + 2e-6).all(), error.max()


def test_masked_and_idle_rows_get_no_gradient() -> None:
    x = torch.tensor([[1.0, -math.inf, 2.0], [math.nan, 1.0, 2.0]], requires_grad=True)
    stats = token_stats(x, torch.tensor([0, -100]))
    stats.entropy[0].backward(retain_graph=True)
    assert x.grad is not None
    assert x.grad[0, 1] == 0
    assert (x.grad[1] == 0).all()
    x.grad = None
    stats.entropy[1].backward()
    assert x.grad.isnan().tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("start", [token_stats, linear_token_stats])
@pytest.mark.parametrize("changed", [10**9, -1])
def test_targets_that_changed_since_the_forward_pass(start: Any, changed: int) -> None:
    ids = numpy.array([1, 2])
    inputs = [torch.randn(2, 5), torch.randn(8, 5)][: 1 + (start is linear_token_stats)]
    stats = start(inputs[0].requires_grad_(), *inputs[1:], torch.from_numpy(ids))
    ids[1] = changed  # through NumPy, which autograd does not see
    with pytest.raises(ValueError, match=f"target_ids must be in .*, got {changed} at position 1"):
        stats.logprob.sum().backward()


def test_an_argmax_that_is_no_column() -> None:
    x, grad = torch.randn(2, 5), torch.ones(2)
    stats = token_stats(x)
    with pytest.raises(ValueError, match=r"argmax must be in \[-1, 5\), got 5 at position 1"):
        torch.ops.robustft.token_stats_backward(
            *(grad, None, None, None, x, None, stats.entropy, stats.max_logprob),
            *(torch.tensor([-1, 5]), 1.0, 0.0, -100, 5),
        )


def test_margin_carries_no_gradient() -> None:
    stats = token_stats(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1]))
    assert not stats.margin.requires_grad
    assert stats.entropy.requires_grad


def test_forward_mode_is_refused_not_zero() -> None:
    x = torch.randn(3, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.func's own deprecations
        with pytest.raises(NotImplementedError, match="logits: forward-mode"):
            torch.func.jvp(lambda z: token_stats(z).entropy, (x,), (x,))
        with pytest.raises(NotImplementedError, match="weight: forward-mode"):
            torch.func.jvp(lambda z: linear_token_stats(x, z).entropy, (x,), (x,))


def test_functional_gradients_are_refused_and_what_needs_none_works() -> None:
    x, w = torch.randn(3, 7), torch.randn(5, 7)
    with pytest.raises(NotImplementedError, match=r"logits: .* use torch\.autograd\.grad"):
        torch.func.grad(lambda z: token_stats(z).entropy.sum())(x)
    with pytest.raises(NotImplementedError, match=r"weight: .* use torch\.autograd\.grad"):
        torch.func.vjp(lambda z: linear_token_stats(x, z).entropy, w)
    unit = torch.func.grad(lambda z: z.sum() + token_stats(z.detach()).entropy.sum() * 0)(x)
    assert (unit == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 9).to(dtype).requires_grad_()
    t = torch.randint(9, (2, 3))
    torch.library.opcheck(token_stats_op, (x, t, 0.9, 0.0, -100, 9))
    torch.library.opcheck(  # no value test: opcheck takes two NaN for different
        token_stats_op,
        (x, None, 0.9, 0.0, -100, 9),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_whole_and_dynamic() -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def loss(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s = token_stats(y * 2, t, temperature=0.9)
        return (s.entropy - s.logprob).mean() + s.margin.mean()

    for n in (3, 5):
        x = torch.randn(n, 12, requires_grad=True)
        t = torch.randint(12, (n,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own deprecations
            loss(x, t).backward()
        y = x.detach().clone().requires_grad_()
        s = token_stats(y * 2, t, temperature=0.9)
        ((s.entropy - s.logprob).mean() + s.margin.mean()).backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_packed_sequences_compile_whole_and_are_checked() -> None:
    def reduced(x: torch.Tensor, t: torch.Tensor, bounds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        s = token_stats(x, t, cu_seqlens=bounds).sequences
        return s.nll, s.entropy, s.max_entropy, s.margin, s.rank, s.tokens

    compiled = torch.compile(reduced, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 8):
        x, t = torch.randn(n, 12, requires_grad=True), torch.randint(12, (n,))
        bounds = torch.tensor([0, 2, 2, n], dtype=torch.int32)
        found, expected = compiled(x, t, bounds), reduced(x, t, bounds)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        slopes = [torch.autograd.grad(nll.nansum(), x)[0] for nll, *_ in (found, expected)]
        torch.testing.assert_close(*slopes)
        with pytest.raises(ValueError, match=rf"cu_seqlens must rise from 0 to {n}, got \[0 9\]"):
            compiled(x, t, torch.tensor([0, 9]))


def test_meta_and_autocast() -> None:
    x = torch.empty(3, 5, 70000, device="meta", dtype=torch.bfloat16)
    stats = token_stats(x, torch.empty(3, 5, device="meta", dtype=torch.int64))
    assert stats.entropy.shape == (3, 5)
    assert stats.entropy.dtype == torch.float32
    assert stats.rank.dtype == torch.int64
    y = torch.randn(4, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_stats(y)
    assert torch.equal(inside.entropy, token_stats(y).entropy)


def test_many_rows() -> None:
    x = torch.randn(70001, 3)
    assert token_stats(x).entropy.shape == (70001,)
    stats = token_stats(x[:1].expand(2**20, 3))
    assert (stats.entropy == stats.entropy[0]).all()


@pytest.mark.parametrize("vocab", [1, 3])
def test_no_probability_above_one(vocab: int) -> None:
    """Nor by rounding: logprob of a certain column is 0, not 1e-7."""
    x = torch.randn(2000, vocab, generator=torch.Generator().manual_seed(0)) * 300
    stats = token_stats(x, torch.zeros(2000, dtype=torch.long), temperature=0.37)
    assert stats.logprob is not None
    assert stats.logprob.max() <= 0
    assert stats.max_logprob.max() <= 0


@pytest.mark.parametrize("wrong", [numpy.zeros((2, 3), "f4"), [[1.0]], None], ids=type)
def test_what_is_no_tensor(wrong: Any) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"logits must be a torch.Tensor, got "):
        token_stats(wrong)
    if wrong is not None:
        with pytest.raises(TypeError, match=r"target_ids must be a torch.Tensor, got "):
            token_stats(x, wrong)
