"""Token statistics straight from hidden states: the [N, V] logits never exist at once."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from robustft_kernels.reference import (
    Grads,
    Options,
    Saved,
    Seven,
    check_range,
    columns,
    empty_columns,
)
from robustft_kernels.results import PartialTokenStats, TokenStats, finish
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
    forward,
    native,
    to_numpy,
    triton_module,
)

# CPU tiles of logits: small enough for the last-level cache, large enough for a fast GEMM. Many
# rows, because the library packs the weights again for every block of rows.
CPU_ROWS, CPU_COLUMNS = 2048, 3072
# Logits so few that one product and one pass by one thread beat tiles, whose sums take 0.2 ms.
CPU_FEW = 1 << 17
# Bytes of logits at a time where whole rows are made: on a GPU, and in the backward pass.
WORKSPACE = 256 << 20


# ---- forward -----------------------------------------------------------------------------------


def target_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """The targets' logits [N] in dtype; NaN where there is no target.

    Computed ahead of the tiles and put in their place in them, so that logprob, rank and argmax
    agree on one value whatever the rounding of the matrix product.
    """
    out = hidden.new_empty(hidden.shape[0], dtype=dtype)
    wide = _wide(hidden)
    step = max(1, (1 << 20) // max(1, hidden.shape[1]))
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, start + step)
        ids = target_ids[rows]
        inside = (ids != ignore_index) & (ids >= 0) & (ids < weight.shape[0])
        safe = ids.where(inside, 0)
        product = torch.linalg.vecdot(hidden[rows].to(wide), weight[safe].to(wide))
        if bias is not None:
            product = product + bias[safe]
        out[rows] = product.to(dtype).masked_fill(~inside, torch.nan)
    return out


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a CPU multiplies matrices of `dtype` in.

    float32 where it lacks the instructions for 16-bit ones: PyTorch's loops for them are ten times
    slower there than float32 products of copies.
    """
    probes = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if dtype not in probes:
        return dtype
    try:
        return dtype if getattr(torch.ops.mkldnn, probes[dtype])() else torch.float32
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return torch.float32


def _logits_dtype(x: Tensor) -> torch.dtype:
    """What logits of operands like x are held in: a GPU's sums of 16-bit products are float32."""
    return _wide(x) if x.device.type == "cuda" else x.dtype


def _product(h: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if out.dtype != h.dtype:  # float32 from 16-bit operands, on CUDA alone
        torch.mm(h, w.t(), out_dtype=out.dtype, out=out)
        if bias is not None:
            out += bias
    elif bias is None:
        torch.mm(h, w.t(), out=out)
    else:
        torch.addmm(bias.to(out.dtype), h, w.t(), out=out)


def _tiled(
    core: Any,
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> Seven:
    """CPU: each tile of logits is reduced while it is in the cache, and overwritten by the next."""
    n, vocab = hidden.shape[0], weight.shape[0]
    dtype = product_dtype(hidden.dtype)
    ids = levels = None
    if target_ids is not None:
        check_range(target_ids, vocab, options.ignore_index)
        ids = target_ids.to(torch.int64)
        levels = target_logits(hidden, weight, bias, target_ids, options.ignore_index, dtype)
        levels = levels.to(_wide(hidden))
    out = empty_columns(hidden, torch.Size([n]))
    # Fewer rows, more columns: a product too small is a slow one.
    step = min(8 * CPU_COLUMNS, CPU_COLUMNS * CPU_ROWS // max(1, min(n, CPU_ROWS)))
    copies = None  # of the weights of a tile, where they are not multiplied as they are
    if dtype != hidden.dtype:
        step = min(step, max(1, CPU_ROWS * CPU_COLUMNS // max(1, hidden.shape[1])))
        copies = weight.new_empty((min(vocab, step), hidden.shape[1]), dtype=dtype)
    workspace = hidden.new_empty(min(n, CPU_ROWS) * min(vocab, step), dtype=dtype)
    for start in range(0, n, CPU_ROWS):
        rows = slice(start, min(n, start + CPU_ROWS))
        h = hidden[rows].to(dtype)
        reals = torch.zeros(4, h.shape[0], dtype=torch.float64)
        reals[:2] = -torch.inf
        counts = torch.zeros(2, h.shape[0], dtype=torch.int64)
        for first in range(0, vocab, step):
            w = weight[first : first + step]
            if copies is not None:
                w = copies[: w.shape[0]].copy_(w)
            x = workspace[: h.shape[0] * w.shape[0]].view(1, h.shape[0], w.shape[0])
            _product(h, w, None if bias is None else bias[first : first + step], x[0])
            core.token_stats_accumulate(
                to_numpy(x),
                None if ids is None else ids[rows].numpy(),
                None if levels is None else levels[rows].numpy(),
                first,
                options.temperature,
                options.softcap,
                torch.get_num_threads(),
                reals.numpy(),
                counts.numpy(),
            )
        top, second, total, weighted = reals.unbind()
        stats = finish(
            PartialTokenStats(
                max=top,
                second=second,
                sum_exp=total,
                weighted=weighted,
                argmax=counts[0],
                target_logit=None if levels is None else levels[rows].double(),
                rank=None if ids is None else counts[1],
                temperature=options.temperature,
                softcap=options.softcap,
            )
        )
        for column, value in zip(out, columns(stats), strict=True):
            column[rows] = value
    return out


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> Seven:
    """Whole rows of logits, as many at a time as the workspace holds, then the logits kernel."""
    n, vocab = hidden.shape[0], weight.shape[0]
    dtype = _logits_dtype(hidden)
    step = rows_per_chunk(n, vocab, dtype)
    workspace = torch.empty((step, vocab), dtype=dtype, device=hidden.device)
    out = empty_columns(hidden, torch.Size([n]))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        x = workspace[: hidden[rows].shape[0]]
        _product(hidden[rows], weight, bias, x)
        ids = None if target_ids is None else target_ids[rows]
        found = forward(x, ids, options)
        if step >= n:  # all of them
            return found
        for column, value in zip(out, found, strict=True):
            column[rows] = value
    return out


def _fused(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> Seven:
    """GPU: one kernel multiplies and reduces; no logit reaches memory."""
    from robustft_kernels import linear_token_stats_triton as launch

    if hidden.device.type != "cuda" or not launch.fits(hidden, weight):
        raise ValueError(
            "design 'fused' needs bfloat16 or float16 on CUDA or ROCm, D a multiple of 64 and "
            "16-byte aligned rows that do not overlap, "
            f"got {hidden.dtype} {tuple(hidden.shape)} on {hidden.device}"
        )
    levels = None
    if target_ids is not None:
        levels = launch.target_logits(hidden, weight, bias, target_ids, options.ignore_index)
    scale = options.temperature, options.softcap
    found: Seven = launch.forward(hidden, weight, target_ids, levels, bias, *scale)
    return found


def _fused_is_faster(hidden: Tensor, weight: Tensor) -> bool:
    """Where the fused kernel was measured to win: Hopper, on any shape that it takes."""
    if hidden.device.type != "cuda" or triton_module() is None:
        return False
    from robustft_kernels import linear_token_stats_triton as launch
    from robustft_kernels.partials_triton import arch_of

    return arch_of(hidden.device) == 90 and launch.fits(hidden, weight)


def rows_per_chunk(n: int, vocab: int, dtype: torch.dtype) -> int:
    """How many rows of logits the workspace holds; a multiple of 128 where it can be."""
    rows = max(1, WORKSPACE // (vocab * dtype.itemsize))
    return max(1, min(n, rows if rows < 128 else rows // 128 * 128))


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
    given = (hidden, weight, target_ids, bias, Options(temperature, softcap, ignore_index))
    with torch.autocast(hidden.device.type, enabled=False):
        core = native() if hidden.device.type == "cpu" else None
        if design == "fused" or (design == "auto" and _fused_is_faster(hidden, weight)):
            return _fused(*given)
        few = hidden.shape[0] * weight.shape[0] <= CPU_FEW
        few = few and product_dtype(hidden.dtype) == hidden.dtype
        if core is not None and design == "auto" and not few:
            return _tiled(core, *given)
        return _chunked(*given)


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
    bias_grad = weight.new_zeros(vocab, dtype=_wide(weight)) if needs_bias else None
    with torch.autocast(hidden.device.type, enabled=False):
        # Logits as the forward pass had them, or what it normalised by would not fit.
        if hidden.device.type == "cpu":
            hidden = hidden.to(product_dtype(hidden.dtype))
        w = weight.to(hidden.dtype)
        dtype = _logits_dtype(hidden)
        step = rows_per_chunk(n, vocab, dtype)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            h = hidden[rows]
            x = h.new_empty((h.shape[0], vocab), dtype=dtype)
            _product(h, w, bias, x)
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
                    weight_grad = product if step >= n else product.to(_wide(weight))
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
