"""Token statistics straight from hidden states: the [N, V] logits never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustft_kernels.linear_designs import (
    by_design,
    logits_dtype,
    multiply,
    product_dtype,
    rows_per_chunk,
    sums_dtype,
)
from robustft_kernels.reference import Grads, Options, Saved, Seven, empty_columns
from robustft_kernels.results import TokenStats
from robustft_kernels.token_stats import (
    FLOATS,
    assemble,
    backward,
    check_factor,
    check_options,
    check_targets,
    check_tensor,
    check_vocab_size,
    check_whole,
)

# ---- operators ---------------------------------------------------------------------------------


@torch.library.custom_op(
    "robustft::linear_token_stats",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? target_ids, Tensor? bias, float temperature, "
    "float softcap, int ignore_index, str design) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_token_stats_op(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    design: str,
) -> Seven:
    """Run the chosen design; `linear_token_stats` checks first."""
    options = Options(temperature, softcap, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        return by_design(design, hidden, weight, target_ids, bias, options)


@linear_token_stats_op.register_fake
def _(hidden: Tensor, *_: Any) -> Seven:
    return empty_columns(hidden, hidden.shape[:1])


@torch.library.custom_op(
    "robustft::linear_token_stats_backward",
    mutates_args=(),
    schema="(Tensor? entropy_grad, Tensor? logprob_grad, Tensor? logsumexp_grad, "
    "Tensor? max_logprob_grad, Tensor hidden, Tensor weight, Tensor? target_ids, Tensor? bias, "
    "Tensor entropy, Tensor max_logprob, Tensor argmax, float temperature, float softcap, "
    "int ignore_index, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
)
def linear_token_stats_backward_op(
    entropy_grad: Tensor | None,
    logprob_grad: Tensor | None,
    logsumexp_grad: Tensor | None,
    max_logprob_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor | None,
    bias: Tensor | None,
    entropy: Tensor,
    max_logprob: Tensor,
    argmax: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for hidden, weight and bias (empty where not needed); logits are made again."""
    n, vocab = hidden.shape[0], weight.shape[0]
    grads = (entropy_grad, logprob_grad, logsumexp_grad, max_logprob_grad)
    options = Options(temperature, softcap, ignore_index)
    hidden_grad = torch.empty_like(hidden)
    # Sums over chunks stay in float32 even for 16-bit parameters.
    weight_grad = weight.new_zeros(weight.shape) if needs_weight and n == 0 else None
    bias_grad = weight.new_zeros(vocab, dtype=sums_dtype(weight)) if needs_bias else None
    with torch.autocast(hidden.device.type, enabled=False):
        # Logits as the forward pass had them, or what it normalised by would not fit.
        if hidden.device.type == "cpu":
            hidden = hidden.to(product_dtype(hidden.dtype))
        w = weight.to(hidden.dtype)
        dtype = logits_dtype(hidden)
        step = rows_per_chunk(n, vocab, dtype)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            h = hidden[rows]
            x = h.new_empty((h.shape[0], vocab), dtype=dtype)
            multiply(h, w, bias, x)
            part: Grads = tuple(None if g is None else g[rows] for g in grads)  # type: ignore[assignment]
            ids = None if target_ids is None else target_ids[rows]
            saved = Saved(ids, entropy[rows], max_logprob[rows], argmax[rows])
            backward(part, x, saved, options, x)
            if bias_grad is not None:
                bias_grad += x.sum(0, dtype=bias_grad.dtype)
            x = x.to(h.dtype)
            hidden_grad[rows] = x @ w
            if needs_weight:
                if weight_grad is None:
                    product = x.t() @ h
                    weight_grad = product if step >= n else product.to(sums_dtype(weight))
                elif weight_grad.dtype == h.dtype:
                    weight_grad.addmm_(x.t(), h)
                else:
                    weight_grad += x.t() @ h
    nothing = hidden.new_empty(0)
    return (
        hidden_grad,
        nothing if weight_grad is None else weight_grad.to(weight.dtype),
        nothing.clone() if bias_grad is None else bias_grad.to(weight.dtype),
    )


@linear_token_stats_backward_op.register_fake
def _(
    entropy_grad: Tensor | None,
    logprob_grad: Tensor | None,
    logsumexp_grad: Tensor | None,
    max_logprob_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    needs_weight, needs_bias = rest[-2:]
    return (
        torch.empty_like(hidden),
        weight.new_empty(weight.shape) if needs_weight else hidden.new_empty(0),
        weight.new_empty(weight.shape[0] if needs_bias else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Seven) -> None:
    hidden, weight, target_ids, bias, *ctx.options, _ = inputs
    entropy, _, _, max_logprob, argmax, _, _ = output
    ctx.save_for_backward(hidden, weight, target_ids, bias, entropy, max_logprob, argmax)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_weight, needs_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    hidden, weight, bias = linear_token_stats_backward_op(
        *grads[:4], *ctx.saved_tensors, *ctx.options, needs_weight, needs_bias
    )
    made = (hidden, weight if needs_weight else None, None, bias if needs_bias else None)
    return *made, None, None, None, None


linear_token_stats_op.register_autograd(_differentiate, setup_context=_save)


# ---- public ------------------------------------------------------------------------------------


def _checked_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hidden and weight as autocast has them; raises TypeError or ValueError."""
    operands = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, x in operands.items():
        check_tensor(x, name)
        if x.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} as hidden is, got {x.device}")
    if hidden.dtype not in FLOATS:
        raise TypeError(f"hidden must be float32, bfloat16, float16 or float64, got {hidden.dtype}")
    if weight.dim() != 2 or hidden.dim() < 1 or not 1 <= hidden.shape[-1] == weight.shape[1]:
        raise ValueError(
            "hidden must be [..., D] and weight [V, D] with D >= 1, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    device = hidden.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast and hidden.dtype != torch.float64:
        cast = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(cast), weight.to(cast)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight must be {hidden.dtype} as hidden is, got {weight.dtype}")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias must be floating point, got {bias.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if weight.shape[0] < 1:
        raise ValueError("weight must have at least one row, got none")
    return hidden, weight


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    design: str = "auto",
) -> TokenStats:
    """`token_stats` of logit_scale * (hidden @ weight.T + bias), without holding those logits.

    Args:
        hidden: [..., D] float32, bfloat16, float16 or float64.
        weight: [V, D], the lm_head, in hidden's dtype (under autocast both are cast, as
            `torch.nn.functional.linear` does).
        target_ids: [...] integers in [0, V), or `ignore_index`; None leaves out logprob and rank.
        bias: [V] floating, cast to hidden's dtype, or None. -inf masks a column.
        temperature: divides the (capped) logits.
        softcap: Gemma-2's cap, applied after `logit_scale`; None for no cap.
        logit_scale: Cohere's multiplier, in [1e-30, 1e30].
        ignore_index: the target of positions that have none.
        vocab_size: use only the first `vocab_size` rows of weight.
        cu_seqlens: [sequences + 1], see `token_stats`; hidden must then be [N, D].
        design: "auto" (on the CPU, but for a few logits, a product of tiles that are reduced in
            the cache), or, to compare them, "chunked" (the vendor's matrix product on row chunks,
            then the logits kernel) or "fused" (one kernel; CUDA and ROCm only).

    Returns:
        TokenStats, each field shaped [...]. Extra memory does not grow with N times V. On a CPU
        with instructions for 16-bit products, and on any by "chunked", 16-bit logits are rounded
        to 16 bits as `hidden @ weight.T` would be; elsewhere they keep the float32 sums.

    Raises:
        TypeError, ValueError, NotImplementedError: as `token_stats`, and where hidden, weight and
            bias disagree.
    """
    hidden, weight = _checked_operands(hidden, weight, bias)
    check_whole(ignore_index, "ignore_index")
    if vocab_size is not None:
        check_vocab_size(vocab_size, weight.shape[0])
    check_factor(logit_scale, "logit_scale")
    if design not in ("auto", "chunked", "fused"):
        raise ValueError(f"design must be 'auto', 'chunked' or 'fused', got {design!r}")
    cap = check_options(temperature, softcap)
    # scale * x capped at c is c/scale capping x, times scale: no second multiplication.
    for name, value in (("temperature", temperature), ("softcap", cap)):
        if value:
            check_factor(value / logit_scale, f"{name} / logit_scale")
    shape = hidden.shape[:-1]
    target_ids = check_targets(target_ids, shape, hidden.device)
    if vocab_size is not None:  # even of the whole, the gradient of a slice is a copy
        weight = weight[:vocab_size]
        bias = None if bias is None else bias[:vocab_size]
    found = linear_token_stats_op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        None if target_ids is None else target_ids.reshape(-1),
        None if bias is None else bias.to(hidden.dtype),
        temperature / logit_scale,
        cap / logit_scale,
        ignore_index,
        design,
    )
    if len(shape) != 1:
        found = tuple(column.view(shape) for column in found)
    return assemble(found, target_ids, cu_seqlens, ignore_index)
