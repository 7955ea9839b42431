"""Token statistics from hidden states against logits made in float64."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from robustft_kernels import linear_designs, linear_token_stats
from robustft_kernels.linear_token_stats import linear_token_stats_op
from robustft_kernels.reference import token_stats_reference
from robustft_kernels.testing import violations
from robustft_kernels.token_stats import native

pytestmark = pytest.mark.filterwarnings("error")


def problem(dtype: torch.dtype, n: int = 700, vocab: int = 9001) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(n, 16, generator=generator).to(dtype)
    weight = torch.randn(vocab, 16, generator=generator).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    target = torch.randint(vocab, (n,), generator=generator)
    target[3] = -100
    return hidden, weight, bias, target


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("without_core", [False, True])
def test_float64_is_exact(
    with_bias: bool, without_core: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, target = problem(torch.float64, n=600, vocab=5001)
    if without_core:
        for name in ("token_stats", "linear_designs"):
            module = sys.modules[f"robustft_kernels.{name}"]  # the attribute is the function
            monkeypatch.setattr(module, "native", lambda: None)
    bias[7] = -math.inf
    target[9] = 7
    logits = hidden @ weight.T + (bias if with_bias else 0)
    found = linear_token_stats(
        hidden.view(2, 300, 16),
        weight,
        target.view(2, 300),
        bias=bias if with_bias else None,
        softcap=30.0,
        logit_scale=0.5,
        temperature=0.8,
    )
    expected = token_stats_reference(
        (logits * 0.5).view(2, 300, -1), target.view(2, 300), softcap=30.0, temperature=0.8
    )
    assert not violations(found, expected, absolute=1e-12, relative=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_good_as_the_logits_of_that_dtype(dtype: torch.dtype) -> None:
    hidden, weight, bias, target = problem(dtype)
    exact = token_stats_reference(hidden.double() @ weight.double().T + bias.double(), target)
    plain = token_stats_reference(torch.nn.functional.linear(hidden, weight, bias), target)
    found = linear_token_stats(hidden, weight, target, bias=bias)
    for name in ("entropy", "logprob", "logsumexp", "max_logprob"):
        ours = (getattr(found, name) - getattr(exact, name)).abs().nan_to_num()
        theirs = (getattr(plain, name) - getattr(exact, name)).abs().nan_to_num()
        assert ours.max() <= 1.5 * theirs.max() + 1e-5, name
    assert torch.equal(found.rank == 0, found.argmax == target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_16_bit_instructions_sums_stay_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_designs, "product_dtype", lambda _: torch.float32)
    monkeypatch.setattr(linear_designs, "CPU_ROWS", 7)
    monkeypatch.setattr(linear_designs, "CPU_COLUMNS", 64)
    hidden, weight, bias, target = problem(dtype, n=40, vocab=300)
    exact = token_stats_reference(hidden.double() @ weight.double().T + bias.double(), target)
    found = linear_token_stats(hidden, weight, target, bias=bias)
    assert found.entropy.dtype == torch.float32
    assert not violations(found, exact, absolute=1e-5, relative=1e-5)


def test_the_gradient_of_16_bit_operands_fits_float32_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As on a GPU, and on a CPU without 16-bit products: what the forward pass normalised by is
    # not the maximum of logits that are rounded to 16 bits.
    for module in (linear_designs, sys.modules[linear_token_stats.__module__]):
        monkeypatch.setattr(module, "product_dtype", lambda _: torch.float32)
    hidden, weight, _, target = problem(torch.bfloat16, n=40, vocab=300)
    inputs = [(8 * hidden).requires_grad_(), weight.clone().requires_grad_()]
    stats = linear_token_stats(inputs[0], inputs[1], target)
    found = torch.autograd.grad(stats.logsumexp.sum(), inputs)
    wide = [one.detach().double().requires_grad_() for one in inputs]
    exact = torch.autograd.grad((wide[0] @ wide[1].T).logsumexp(-1).sum(), wide)
    for one, two in zip(found, exact, strict=True):
        error = (one.double() - two).norm() / two.norm()
        assert error < 4e-3  # of storing it in bfloat16


def test_vocab_size_and_sequences() -> None:
    hidden, weight, _, target = problem(torch.float32, n=20, vocab=100)
    target %= 60
    target[3] = -100
    found = linear_token_stats(
        hidden, weight, target, vocab_size=60, cu_seqlens=torch.tensor([0, 5, 20])
    )
    exact = token_stats_reference(hidden.double() @ weight[:60].double().T, target)
    assert not violations(found, exact, absolute=1e-5, relative=1e-5)
    assert found.sequences is not None
    assert found.sequences.tokens.tolist() == [4, 15]


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
def test_gradcheck(needs: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(1)
    shapes = [(6, 3), (5, 3), (5,)]
    h, w, b = (
        torch.randn(shape, dtype=torch.float64, requires_grad=need)
        for shape, need in zip(shapes, needs, strict=True)
    )
    t = torch.tensor([0, 1, 2, 3, 4, -100])

    def outputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, weight, bias = tensors
        s = linear_token_stats(hidden, weight, t, bias=bias, softcap=3.0, logit_scale=2.0)
        return s.entropy, s.logprob[:5], s.logsumexp, s.max_logprob

    assert torch.autograd.gradcheck(outputs, (h, w, b))


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("n", [8, 0])
def test_gradient_in_one_piece_and_in_chunks(
    rows: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_designs, "WORKSPACE", rows * 40 * 4)
    hidden, weight, bias, target = problem(torch.float32, n=n or 8, vocab=40)
    weight = weight.T.contiguous().T  # in columns
    inputs = [x.requires_grad_() for x in (hidden[:n], weight, bias)]
    s = linear_token_stats(inputs[0], inputs[1], target[:n], bias=inputs[2])
    found = torch.autograd.grad((s.entropy + s.logsumexp).sum(), inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    log_p = (logits := wide[0] @ wide[1].T + wide[2]).log_softmax(-1)
    loss = logits.logsumexp(-1).sum() - (log_p.exp() * log_p).sum()
    for one, two in zip(found, torch.autograd.grad(loss, wide), strict=True):
        torch.testing.assert_close(one, two.float(), atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_whole_weight_is_not_copied() -> None:
    hidden, weight, bias, target = problem(torch.float32, n=5, vocab=11)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    s = linear_token_stats(inputs[0], inputs[1], target, bias=inputs[2])
    assert s.entropy.grad_fn is not None
    _, *before = (str(node) for node, _ in s.entropy.grad_fn.next_functions if node is not None)
    assert len(before) == 2  # weight and bias
    assert all("AccumulateGrad" in node for node in before), before


def test_opcheck() -> None:
    hidden, weight, bias, target = problem(torch.float32, n=5, vocab=11)
    target[3] = 0  # opcheck compares NaN as unequal
    hidden.requires_grad_()
    weight.requires_grad_()
    for w in (weight, weight.detach().T.contiguous().T.requires_grad_()):
        torch.library.opcheck(
            linear_token_stats_op, (hidden, w, target, bias, 0.9, 0.0, -100, "auto")
        )


def test_compiles_whole_and_dynamic() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s = linear_token_stats(h, w, t)
        return (s.entropy - s.logprob).mean()

    hidden, weight, _, target = problem(torch.float32, n=8, vocab=40)
    target[3] = 0
    for n in (4, 8):
        h = hidden[:n].clone().requires_grad_()
        loss(h, weight, target[:n]).backward()
        g = hidden[:n].clone().requires_grad_()
        s = linear_token_stats(g, weight, target[:n])
        (s.entropy - s.logprob).mean().backward()
        torch.testing.assert_close(h.grad, g.grad)


def test_meta_autocast_and_empty() -> None:
    meta = linear_token_stats(
        torch.empty(2, 3, 8, device="meta"), torch.empty(50, 8, device="meta")
    )
    assert meta.entropy.shape == (2, 3)
    hidden, weight, _, target = problem(torch.float32, n=8, vocab=40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_token_stats(hidden, weight, target)
    outside = linear_token_stats(hidden.bfloat16(), weight.bfloat16(), target)
    assert torch.equal(inside.entropy, outside.entropy)
    assert linear_token_stats(hidden[:0], weight).entropy.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weight": torch.randn(5, 4)}, ValueError, r"hidden must be \[..., D\]"),
        ({"weight": torch.randn(5, 3).double()}, TypeError, "weight must be torch.float32"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[5\], got \(4,\)"),
        ({"bias": torch.zeros(5, dtype=torch.cfloat)}, TypeError, "bias must be floating"),
        ({"bias": torch.ones(5, dtype=torch.bool)}, TypeError, "bias must be floating"),
        ({"logit_scale": 0.0}, ValueError, r"logit_scale must be in \[1e-30, 1e30\]"),
        ({"logit_scale": 1e20, "temperature": 1e-20}, ValueError, "temperature / logit_scale"),
        ({"weight": torch.randn(5, 0), "hidden": torch.randn(2, 0)}, ValueError, "with D >= 1"),
        ({"design": "best"}, ValueError, "design must be"),
        ({"design": "fused"}, ValueError, "design 'fused' needs"),
        ({"vocab_size": 2.0}, TypeError, "vocab_size must be a whole number, got 2.0"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be a whole number, got 1.5"),
        ({"ignore_index": 2**63}, ValueError, f"ignore_index must fit int64, got {2**63}"),
        ({"vocab_size": 6}, ValueError, r"vocab_size must be in \[1, 5\], got 6"),
        ({"target_ids": torch.tensor([0, 5])}, ValueError, "got 5 at position 1"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        linear_token_stats(
            **({"hidden": torch.randn(2, 3), "weight": torch.randn(5, 3)} | arguments)
        )


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64"])
def test_targets_of_any_integer_dtype(name: str) -> None:
    hidden, weight = torch.randn(3, 8), torch.randn(300, 8)
    t = torch.tensor([100, 5, 127 if name == "int8" else 156])
    found, expected = (
        linear_token_stats(hidden, weight, ids) for ids in (t.to(getattr(torch, name)), t)
    )
    assert torch.equal(found.logprob, expected.logprob)
    assert torch.equal(found.rank, expected.rank)


def test_chunked_is_chunked_on_the_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, target = problem(torch.float32, n=70, vocab=500)
    expected = token_stats_reference((hidden.double() @ weight.double().T) + bias, target)
    monkeypatch.setattr(linear_designs, "_tiled", None)
    found = linear_token_stats(hidden, weight, target, bias=bias, design="chunked")
    assert not violations(found, expected, absolute=1e-5, relative=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_few_logits_are_made_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_designs, "_tiled", None)
    hidden, weight, bias, target = problem(dtype, n=8, vocab=16384)
    expected = token_stats_reference((hidden.double() @ weight.double().T) + bias, target)
    found = linear_token_stats(hidden, weight, target, bias=bias)
    assert not violations(found, expected, absolute=1e-5, relative=1e-5)


def test_memory_does_not_grow_with_n_times_v() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    Largest.size = max(Largest.size, x.untyped_storage().nbytes())
            return out

    hidden, weight, _, target = problem(torch.float32, n=3000, vocab=20000)
    with Largest():
        linear_token_stats(hidden, weight, target)
    assert native() is not None
    assert Largest.size <= 8 << 20  # one tile; the logits would be 240 MB


def test_operands_elsewhere() -> None:
    hidden, weight, bias = torch.randn(5, 8), torch.randn(11, 8), torch.randn(11)
    with pytest.raises(ValueError, match="weight must be on cpu as hidden is, got meta"):
        linear_token_stats(hidden, weight.to("meta"))
    with pytest.raises(ValueError, match="bias must be on cpu as hidden is, got meta"):
        linear_token_stats(hidden, weight, bias=bias.to("meta"))
    with pytest.raises(TypeError, match=r"weight must be a torch.Tensor, got torch.nn.*Linear"):
        linear_token_stats(hidden, torch.nn.Linear(8, 11))  # type: ignore[arg-type]
