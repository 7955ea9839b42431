"""Token entropy and noise score in the logs of transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import TrainerCallback

from robustft.training.signals import StepSignals
from robustft_kernels import linear_token_stats

__all__ = ["TokenStatsCallback"]

_log = logging.getLogger("robustft")
_IGNORED = -100


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

    Each process measures its own batches, and process 0 logs. Weights that are sharded between
    processes (FSDP, ZeRO-3) cannot be read this way: there it says so once and does nothing.
    """

    def __init__(self) -> None:
        self._signals = StepSignals()
        self._hooks: list[Any] = []
        self._labels: torch.Tensor | None = None
        self._due = False

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
        self._head, self._config = head, causal.config.get_text_config()
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
        found = {name: round(value, 6) for name, value in self._signals.take().items()}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Stop listening."""
        self._remove()

    # --- hooks ---------------------------------------------------------------------------------

    def _note_labels(self, module: Any, args: Any, inputs: dict[str, Any]) -> None:
        labels = inputs.get("labels")
        self._labels = labels if self._due and module.training else None

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
        with torch.no_grad():
            # The head's own dtype: under autocast the states may have another.
            states = hidden[:, :-1][chosen].to(self._head.weight.dtype)
            stats = linear_token_stats(
                states,
                self._head.weight,
                targets[chosen],
                bias=getattr(self._head, "bias", None),
                softcap=getattr(self._config, "final_logit_softcapping", None),
                logit_scale=getattr(self._config, "logit_scale", None) or 1.0,
                cu_seqlens=_run_edges(chosen),
            )
        self._signals.add(stats)

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _is_whole(weight: Any, config: Any) -> bool:
    """Whether this process holds the whole [V, D] output embedding."""
    vocabulary = int(config.get_text_config().vocab_size)
    return type(weight).__name__ != "DTensor" and weight.dim() == 2 and len(weight) >= vocabulary


def _run_edges(chosen: torch.Tensor) -> torch.Tensor:
    """[runs + 1] bounds of the runs of labelled positions, in the order of `chosen` [B, T]."""
    before = torch.nn.functional.pad(chosen, (1, 0))[:, :-1]
    starts = (chosen & ~before)[chosen].nonzero()[:, 0]  # places among the chosen ones
    return torch.cat([starts, starts.new_tensor([int(chosen.sum())])])
