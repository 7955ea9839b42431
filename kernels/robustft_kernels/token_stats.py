"""Entropy, log-probability, margin and rank of every position in one pass over the logits."""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_gradtrackingtensor
from torch.autograd.forward_ad import unpack_dual

from robustft_kernels.reference import (
    Grads,
    Options,
    Saved,
    Seven,
    backward_by_reference,
    empty_columns,
    forward_by_reference,
)
from robustft_kernels.results import TokenStats
from robustft_kernels.sequences import is_integer, reduce_sequences

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LEAST_FACTOR, _LARGEST_FACTOR = 1e-30, 1e30


# ---- CPU ---------------------------------------------------------------------------------------


@functools.cache
def native() -> ModuleType | None:
    """The C++ core, or None in an install without it."""
    try:
        from robustft import _core
    except ImportError:
        return None
    return _core


def rows_view(x: Tensor) -> Tensor:
    """X [..., V] as [outer, inner, V] with unit last stride, copied only if no view exists."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.dim() < 3:
        return x.reshape(1, -1, x.shape[-1])
    return x if x.dim() == 3 else x.flatten(0, -3)


def to_numpy(x: Tensor) -> Any:
    """X as a numpy array over the same memory; bfloat16 as its bits in uint16."""
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def flat_ids(target_ids: Tensor | None) -> Any:
    """[..., ] ids as the flat int64 array the core takes."""
    return None if target_ids is None else target_ids.reshape(-1).to(torch.int64).numpy()


@functools.cache
def triton_module() -> Any:
    """The launcher of the Triton kernel, or None where Triton is not installed."""
    try:
        return importlib.import_module("robustft_kernels.token_stats_triton")
    except ImportError:
        return None


def kernels_of(x: Tensor) -> tuple[ModuleType | None, Any]:
    """(C++ core, Triton launchers) that can take x; at most one is not None."""
    if x.device.type == "cpu":
        return native(), None
    if x.device.type == "cuda" and x.dtype != torch.float64:
        return None, triton_module()
    return None, None


def forward(x: Tensor, target_ids: Tensor | None, options: Options) -> Seven:
    """Run the best kernel for x [..., V]."""
    core, launch = kernels_of(x)
    found: Seven
    if core is not None:
        threads = torch.get_num_threads()
        made = core.token_stats(to_numpy(rows_view(x)), flat_ids(target_ids), *options, threads)
        # Shaped by numpy: seven views by torch take a quarter of a small call.
        shape = x.shape[:-1]
        a, b, c, d, i, e, j = (torch.from_numpy(v.reshape(shape)) for v in made)
        found = a, b, c, d, i, e, j
    elif launch is not None:
        found = launch.forward(x, target_ids, options)
    else:
        found = forward_by_reference(x, target_ids, options)
    return found


def backward(grads: Grads, x: Tensor, saved: Saved, options: Options, out: Tensor) -> None:
    """Write the gradient for x [..., V] into `out`, which may be x itself."""
    core, launch = kernels_of(x)
    if core is not None:
        real = saved.entropy.dtype
        core.token_stats_backward(
            to_numpy(rows_view(x)),
            flat_ids(saved.target_ids),
            *options,
            torch.get_num_threads(),
            tuple(None if g is None else g.reshape(-1).to(real).numpy() for g in grads),
            (saved.entropy.reshape(-1).numpy(), saved.max_logprob.reshape(-1).numpy()),
            saved.argmax.reshape(-1).numpy(),
            to_numpy(rows_view(out)),
        )
    elif launch is not None:
        gradient = importlib.import_module("robustft_kernels.gradient_triton")
        gradient.backward(grads, x, saved, options, out)
    else:
        out.copy_(backward_by_reference(grads, x, saved, options))


# ---- operators ---------------------------------------------------------------------------------


@torch.library.custom_op(
    "robustft::token_stats",
    mutates_args=(),
    schema="(Tensor logits, Tensor? target_ids, float temperature, float softcap, "
    "int ignore_index, SymInt vocab_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def token_stats_op(
    logits: Tensor,
    target_ids: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    vocab_size: int,
) -> Seven:
    """Run the reference on devices without a kernel of their own; `token_stats` checks first."""
    options = Options(temperature, softcap, ignore_index)
    return forward_by_reference(logits[..., :vocab_size], target_ids, options)


@token_stats_op.register_kernel(["cpu", "cuda"])
def _(
    logits: Tensor,
    target_ids: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    vocab_size: int,
) -> Seven:
    options = Options(temperature, softcap, ignore_index)
    return forward(logits[..., :vocab_size], target_ids, options)


@token_stats_op.register_fake
def _(
    logits: Tensor,
    target_ids: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    vocab_size: int,
) -> Seven:
    return empty_columns(logits, logits.shape[:-1])


@torch.library.custom_op(
    "robustft::token_stats_backward",
    mutates_args=(),
    schema="(Tensor? entropy_grad, Tensor? logprob_grad, Tensor? logsumexp_grad, "
    "Tensor? max_logprob_grad, Tensor logits, Tensor? target_ids, Tensor entropy, "
    "Tensor max_logprob, Tensor argmax, float temperature, float softcap, int ignore_index, "
    "SymInt vocab_size) -> Tensor",
)
def token_stats_backward_op(
    entropy_grad: Tensor | None,
    logprob_grad: Tensor | None,
    logsumexp_grad: Tensor | None,
    max_logprob_grad: Tensor | None,
    logits: Tensor,
    target_ids: Tensor | None,
    entropy: Tensor,
    max_logprob: Tensor,
    argmax: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    vocab_size: int,
) -> Tensor:
    """Gradient of `token_stats` for the logits, in their shape and dtype, contiguous."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    out[..., vocab_size:] = 0
    backward(
        (entropy_grad, logprob_grad, logsumexp_grad, max_logprob_grad),
        logits[..., :vocab_size],
        Saved(target_ids, entropy, max_logprob, argmax),
        Options(temperature, softcap, ignore_index),
        out[..., :vocab_size],
    )
    return out


@token_stats_backward_op.register_fake
def _(
    entropy_grad: Tensor | None,
    logprob_grad: Tensor | None,
    logsumexp_grad: Tensor | None,
    max_logprob_grad: Tensor | None,
    logits: Tensor,
    *_: Any,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Seven) -> None:
    logits, target_ids, *ctx.options = inputs
    entropy, _, _, max_logprob, argmax, _, _ = output
    ctx.save_for_backward(logits, target_ids, entropy, max_logprob, argmax)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    found = token_stats_backward_op(*grads[:4], *ctx.saved_tensors, *ctx.options)
    return found, None, None, None, None, None


token_stats_op.register_autograd(_differentiate, setup_context=_save)


# ---- public ------------------------------------------------------------------------------------


def check_options(temperature: float, softcap: float | None) -> float:
    """The soft cap as the operators take it (0: none); raises ValueError."""
    check_factor(temperature, "temperature")
    if softcap is not None:
        check_factor(softcap, "softcap")
    return softcap or 0.0


def check_factor(value: float, name: str) -> None:
    """What logits are multiplied or divided by: it and its inverse are numbers in float32.

    Raises TypeError or ValueError.
    """
    try:
        inside = _LEAST_FACTOR <= value <= _LARGEST_FACTOR
    except TypeError:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    if not inside:
        raise ValueError(f"{name} must be in [1e-30, 1e30], got {value}")


def check_whole(value: object, name: str) -> None:
    """Raise TypeError for what is no integer, ValueError beyond int64.

    PyTorch's operators raise RuntimeError.
    """
    if not isinstance(value, int) and not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit int64, got {value}")


def check_targets(
    target_ids: Tensor | None, shape: torch.Size, device: torch.device
) -> Tensor | None:
    """The targets as int64, which must be integers of the given shape on the given device."""
    if target_ids is None:
        return None
    check_tensor(target_ids, "target_ids")
    if not is_integer(target_ids):
        raise TypeError(f"target_ids must be integers, got {target_ids.dtype}")
    if target_ids.shape != shape:
        raise ValueError(f"target_ids must be shaped {tuple(shape)}, got {tuple(target_ids.shape)}")
    if target_ids.device != device:
        raise ValueError(f"target_ids must be on {device}, got {target_ids.device}")
    return target_ids.to(torch.int64)


def check_tensor(x: object, name: str) -> None:
    """Numpy arrays have dtypes and shapes like a tensor's, and operators drop a dual's tangent."""
    if not isinstance(x, Tensor):
        kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name} must be a torch.Tensor, got {kind}")
    if torch.compiler.is_compiling():
        return
    if unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        raise NotImplementedError(f"{name}: forward-mode derivatives are not implemented")
    # torch names none of this when it refuses an operator of ours.
    if x.requires_grad and torch.is_grad_enabled() and is_gradtrackingtensor(x):
        raise NotImplementedError(
            f"{name}: torch.func.grad and vjp are not implemented; use torch.autograd.grad"
        )


def check_logits(logits: Tensor, vocab_size: int | None) -> int:
    """The number of columns that count; raises TypeError or ValueError."""
    check_tensor(logits, "logits")
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be [..., V] with V >= 1, got {tuple(logits.shape)}")
    if vocab_size is None:
        return logits.shape[-1]
    check_vocab_size(vocab_size, logits.shape[-1])
    return vocab_size


def check_vocab_size(vocab_size: int, most: int) -> None:
    """Raise TypeError or ValueError unless it is a number of columns in [1, most]."""
    check_whole(vocab_size, "vocab_size")
    if not 1 <= vocab_size <= most:
        raise ValueError(f"vocab_size must be in [1, {most}], got {vocab_size}")


def assemble(
    found: Seven, target_ids: Tensor | None, cu_seqlens: Tensor | None, ignore_index: int
) -> TokenStats:
    """The operators' seven columns as the public result."""
    entropy, logprob, logsumexp, max_logprob, argmax, margin, rank = found
    stats = TokenStats(
        entropy=entropy,
        logprob=None if target_ids is None else logprob,
        logsumexp=logsumexp,
        max_logprob=max_logprob,
        argmax=argmax,
        margin=margin.detach(),
        rank=None if target_ids is None else rank,
    )
    if cu_seqlens is None:
        return stats
    check_tensor(cu_seqlens, "cu_seqlens")
    return replace(stats, sequences=reduce_sequences(stats, cu_seqlens, target_ids, ignore_index))


def token_stats(
    logits: Tensor,
    target_ids: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> TokenStats:
    """Entropy, log-probability and rank of every position, reading the logits once.

    The same as, in float64::

        z = softcap * tanh(logits / softcap) / temperature      # without softcap: / temperature
        log_p = log_softmax(z, -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        logprob = log_p.gather(-1, target_ids[..., None])[..., 0]

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, any strides, any device; never
            modified. C++ on the CPU, Triton on CUDA and ROCm, plain PyTorch elsewhere.
        target_ids: [...] integers in [0, V), or `ignore_index`; None leaves out logprob and rank.
        temperature: divides the (capped) logits; in [1e-30, 1e30].
        softcap: Gemma-2's cap, in [1e-30, 1e30]; None for no cap.
        ignore_index: the target of positions that have none.
        vocab_size: use only the first `vocab_size` columns; padded columns beyond are not read.
        cu_seqlens: [sequences + 1] integers from 0 to N; logits must then be [N, V], and
            `sequences` holds the reductions (eq. 7 of arXiv 2412.14922 among them). To check
            their values a GPU that holds them is waited for.

    Returns:
        TokenStats, each field shaped [...]; see there for -inf, +inf, NaN and ties. Entropy,
        logprob, logsumexp and max_logprob are differentiable, backward and once. The result for
        one row depends on that row alone and is the same from run to run (on a GPU to the last bit
        where all rows lie on 16-byte boundaries; elsewhere the order of its sums follows from where
        it lies).

    Raises:
        TypeError: logits are not floating point, target_ids not integers, one of the three no
            tensor, or an option no number.
        NotImplementedError: a tensor carries a forward-mode tangent (`torch.func.jvp`), or is
            differentiated by `torch.func.grad` or `vjp`; `torch.autograd.grad` works.
        ValueError: shapes disagree, an option is out of range, or, on the CPU, a target is
            neither a column nor `ignore_index`. A GPU is not waited for: there such a target
            gives logprob NaN and rank -1.
    """
    columns = check_logits(logits, vocab_size)
    check_whole(ignore_index, "ignore_index")
    target_ids = check_targets(target_ids, logits.shape[:-1], logits.device)
    cap = check_options(temperature, softcap)
    found = token_stats_op(logits, target_ids, float(temperature), cap, ignore_index, columns)
    return assemble(found, target_ids, cu_seqlens, ignore_index)
