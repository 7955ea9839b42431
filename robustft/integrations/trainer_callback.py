"""Token entropy and noise score in the logs of transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch
from transformers import TrainerCallback

from robustft.training.signals import StepSignals
from robustft_kernels import TokenStats, linear_token_stats

__all__ = ["TokenStatsCallback"]

_log = logging.getLogger("robustft")
_IGNORED = -100
# Settings by which architectures multiply or divide their logits; Granite divides by the one that
# HyperCLOVA X multiplies by.
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


class TokenStatsCallback(TrainerCallback):
    """Adds `token_entropy`, `response_nll` and `noise_score` to what a trainer logs.

    Means over the steps that are logged (every step where one log is written an epoch), as
    `robustft.training.signals` says; a response is a run of labelled tokens. They come from the
    hidden states under the output embedding, so that fused and chunked losses, which never hold
    logits, are measured all the same; the price is one more product with the output embedding on
    each logged step, without gradients.

    `TokenStatsCallback.attach(trainer)` puts it before the reporting callbacks, which then send its
    numbers to wandb, TensorBoard, trackio with the loss. Given as `callbacks=[…]` it stands after
    them: its numbers are in `trainer.state.log_history`, on the progress bar, and nowhere else.

    Each process measures its own batches, and process 0 logs. What cannot be read this way is told
    once, and nothing is done: weights that are sharded between processes (FSDP, ZeRO-3); logits
    that are not the output embedding's, scaled and capped (a pass over two tokens tells, before
    training begins); labels that the model is not given, as with `label_smoothing_factor`.
    """

    def __init__(self) -> None:
        self._signals = StepSignals()
        self._hooks: list[Any] = []
        self._labels: torch.Tensor | None = None
        self._due = self._labelled = False

    @classmethod
    def attach(cls, trainer: Any) -> TokenStatsCallback:
        """Add a new callback to `trainer`, before those that report."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    # --- events --------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Listen to the model's inputs and to its last hidden states."""
        self._remove()
        model = known["model"]
        causal = model.get_base_model() if hasattr(model, "peft_config") else model
        head = causal.get_output_embeddings()
        if head is None or not _is_whole(head.weight, causal.config):
            _log.warning("token statistics are not logged: no whole output embedding to read")
            return
        scaling = _scaling(causal, head)
        if scaling is None:
            _log.warning(
                "token statistics are not logged: the model's logits are not those of its output "
                "embedding"
            )
            return
        self._head, self._scaling, self._labelled = head, scaling, False
        self._hooks = [
            model.register_forward_pre_hook(self._note_labels, with_kwargs=True),
            causal.get_decoder().register_forward_hook(self._measure),
        ]

    def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Decide whether the step that begins will be logged."""
        step = state.global_step + 1
        by_step = args.logging_strategy == "steps"
        first = step == 1 and args.logging_first_step
        self._due = not by_step or first or step % max(int(state.logging_steps), 1) == 0

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **known: Any
    ) -> None:
        """Add the step's numbers to what is logged, once."""
        if logs is None or "loss" not in logs:
            return
        if self._hooks and not self._labelled:
            _log.warning(
                "token statistics are not logged: the model is not given the labels, which label "
                "smoothing and loss functions of one's own take away"
            )
            self._remove()
        found = {name: round(value, 6) for name, value in self._signals.take().items()}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Stop listening."""
        self._remove()

    # --- hooks ---------------------------------------------------------------------------------

    def _note_labels(self, module: Any, args: Any, inputs: dict[str, Any]) -> None:
        labels = inputs.get("labels") if module.training else None
        self._labelled |= labels is not None
        self._labels = labels if self._due else None

    def _measure(self, module: Any, args: Any, output: Any) -> None:
        labels, self._labels = self._labels, None
        if labels is None:
            return
        hidden = getattr(output, "last_hidden_state", None)
        hidden = output[0] if hidden is None else hidden
        # The state before a token predicts it; prompt-learning puts states before the first token.
        hidden = hidden[:, hidden.shape[1] - labels.shape[1] :]
        targets = labels[:, 1:]
        chosen = targets != _IGNORED
        if not bool(chosen.any()):
            return
        states = hidden.detach()[:, :-1][chosen]
        stats = _stats(self._head, states, targets[chosen], *self._scaling, _run_edges(chosen))
        self._signals.add(stats)

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _is_whole(weight: Any, config: Any) -> bool:
    """Whether this process holds the whole [V, D] output embedding."""
    vocabulary = int(config.get_text_config().vocab_size)
    return type(weight).__name__ != "DTensor" and weight.dim() == 2 and len(weight) >= vocabulary


@torch.no_grad()
def _scaling(causal: Any, head: Any) -> tuple[float, float | None] | None:
    """Factor and soft cap that make the model's own logits of the output embedding's product.

    Its settings say what they may be, the model itself which of them it uses: that is safer than a
    list of architectures. None where no way leads to its logits.
    """
    config, training = causal.config.get_text_config(), causal.training
    named = [getattr(config, name, None) for name in _FACTORS]
    values = [float(value) for value in named if isinstance(value, int | float) and value]
    factors = [*values, *(1.0 / value for value in values), 1.0]
    caps: list[float | None] = [getattr(config, "final_logit_softcapping", None), None]
    causal.eval()
    try:
        ids = torch.tensor([[0, 5 % int(config.vocab_size)]], device=causal.device)
        own = causal(input_ids=ids, use_cache=False).logits[0, -1].float()  # [V]
        state = causal.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -1:]
        targets = torch.arange(min(64, len(own)), device=own.device)
        wanted = own.log_softmax(-1)[targets]
        limit = 0.02 * float(own.abs().max()) + 1e-6  # bfloat16 sums in another order
        for way in itertools.product(factors, caps):
            found = _stats(head, state.repeat(len(targets), 1), targets, *way).logprob
            if found is not None and float((found - wanted).abs().max()) <= limit:
                return way
    except (AttributeError, RuntimeError, TypeError, ValueError):
        pass  # a model that takes more than token ids, or gives something else
    finally:
        causal.train(training)
    return None


@torch.no_grad()
def _stats(
    head: Any,
    states: torch.Tensor,
    targets: torch.Tensor,
    factor: float,
    cap: float | None,
    edges: torch.Tensor | None = None,
) -> TokenStats:
    """Statistics of targets [N] after hidden states [N, D]; `edges` [runs + 1] bound their runs."""
    return linear_token_stats(
        states.to(head.weight.dtype),  # under autocast the states may have another
        head.weight,
        targets,
        bias=getattr(head, "bias", None),
        softcap=cap,
        logit_scale=factor,
        cu_seqlens=edges,
    )


def _run_edges(chosen: torch.Tensor) -> torch.Tensor:
    """[runs + 1] bounds of the runs of labelled positions, in the order of `chosen` [B, T]."""
    before = torch.nn.functional.pad(chosen, (1, 0))[:, :-1]
    starts = (chosen & ~before)[chosen].nonzero()[:, 0]  # places among the chosen ones
    return torch.cat([starts, starts.new_tensor([int(chosen.sum())])])
