"""The training loop: response-only loss, AdamW, cosine schedule, checkpoints without pickle.

It trains whatever parameters of the model require gradients and knows nothing of adapters. A
checkpoint is one safetensors file replaced in a single step. All randomness is a function of
(seed, step), so a run killed at any moment and resumed takes the same steps as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.nn import functional

from robustft.config import TrainConfig
from robustft.devices import fast_matmul
from robustft.errors import UserError
from robustft.files import replacing
from robustft.frozen import FrozenTrunk
from robustft.models import has_plain_cache, shared_start
from robustft.progress import Progress
from robustft.training.data import (
    Example,
    TrainingSet,
    epoch_batches,
    learning_rate_at,
    micro_batches,
)
from robustft.training.scratch import scratch_folder
from robustft.training.signals import StepSignals
from robustft.training.trackers import Report
from robustft_kernels import token_stats

_CPU_BATCH_TOKENS = 2048
_CUDA_BATCH_TOKENS = 16384
_MAX_GRADIENT_NORM = 1.0
_FLOAT16_LOSS_SCALE = 2.0**16
_STATE = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


@dataclass(slots=True)
class History:
    """What training has done so far; the part of a checkpoint that is not tensors."""

    step: int = 0
    tokens: int = 0  # without padding, prompt and response
    response_tokens: int = 0
    seconds: float = 0.0
    epoch_losses: list[float] = field(default_factory=list)  # mean nats per response token
    loss_sum: float = 0.0  # of the unfinished epoch
    loss_tokens: int = 0
    loss_scale: float = 1.0  # a power of two; float16 gradients would underflow without


class TrainingLoop:
    """One run of training; `run` starts or continues it."""

    def __init__(
        self, model: Any, data: TrainingSet, config: TrainConfig, checkpoint: Path
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.config = config
        self._half = next(model.parameters()).dtype == torch.float16
        self.history = History(loss_scale=_FLOAT16_LOSS_SCALE if self._half else 1.0)
        self._examples: Sequence[Example] = data.examples
        self._lengths = data.lengths
        self._checkpoint = checkpoint
        on_cpu = self.device.type == "cpu"
        self._budget = config.engine.batch_tokens or (
            _CPU_BATCH_TOKENS if on_cpu else _CUDA_BATCH_TOKENS
        )
        self._cacheable = has_plain_cache(model)
        self._trunk = FrozenTrunk.of(model)
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.trained_parameters = sum(p.numel() for p in self._trained.values())
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), lr=config.learning_rate, weight_decay=0.0
        )
        self._signals: StepSignals | None = None  # of the step at work, where somebody listens
        self._per_epoch = math.ceil(len(self._examples) / config.batch_size)
        self.steps = config.steps or self._per_epoch * config.epochs
        self._epochs = math.ceil(self.steps / self._per_epoch)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one. Raises UserError if it does not fit."""
        if self._checkpoint.exists():
            self._load()

    def run(self, report: Report | None = None, title: str = "train") -> History:
        """Train to the end, saving a checkpoint now and then; `report` gets every step's numbers.

        `title` names the progress.

        Raises:
            UserError: the loss is no longer a number, or one record does not fit the memory.
            KeyboardInterrupt: SIGINT or SIGTERM came; the step at work was finished and saved.
        """
        history, started = self.history, time.monotonic()
        before, saved = history.seconds, started
        self._signals = StepSignals() if report else None
        self.model.train()
        precise = self.config.engine.dtype == "float32"
        shuffled = -1  # the epoch that `batches` belongs to
        with (
            _Interrupt() as interrupt,
            contextlib.nullcontext() if precise else fast_matmul(),
            Progress(title, self.steps, done=history.step, unit="steps") as progress,
        ):
            while history.step < self.steps:
                epoch, position = divmod(history.step, self._per_epoch)
                if epoch != shuffled:
                    batches = epoch_batches(
                        self._lengths, self.config.batch_size, self.config.seed, epoch
                    )
                    shuffled = epoch
                loss = self._step(batches[position].tolist())
                history.step += 1
                if report:
                    report.log(self._numbers(loss), history.step)
                if history.step % self._per_epoch == 0 or history.step == self.steps:
                    history.epoch_losses.append(history.loss_sum / history.loss_tokens)
                    history.loss_sum, history.loss_tokens = 0.0, 0
                progress.update(1, f"epoch {epoch + 1} of {self._epochs}, loss {loss:.3f}")
                now = time.monotonic()
                history.seconds = before + now - started
                due = now - saved >= self.config.checkpoint_seconds
                if due or interrupt.came or history.step == self.steps:
                    self._save()
                    saved = now
                if interrupt.came:
                    interrupt.deliver()
        return history

    # --- one step ----------------------------------------------------------------------------

    def _step(self, batch: Sequence[int]) -> float:
        """One optimizer step over `batch`; mean loss in nats per response token."""
        step = self.history.step
        response = sum(self._examples[index].response for index in batch)
        torch.manual_seed(hash((self.config.seed, step)) % 2**63)  # dropout
        while True:
            try:
                loss, norm = self._gradients(batch, response)
            except torch.OutOfMemoryError as error:
                widest = int(self._lengths[list(batch)].max())
                if self._budget < widest:
                    # A larger device can go on with what is saved.
                    elsewhere = ", with another --out: this one holds the steps done so far"
                    raise UserError(
                        f"a record of {widest} tokens does not fit the device's memory; "
                        "lower --cutoff, or adapt fewer layers with --top-layers"
                        f"{elsewhere if self._checkpoint.exists() else ''}"
                    ) from error
                self._budget = min(self._budget, widest * len(batch)) // 2
            else:
                if math.isfinite(norm) or not math.isfinite(loss) or self.history.loss_scale == 1:
                    break
                self.history.loss_scale /= 2  # a scaled gradient was beyond float16
                continue
            torch.cuda.empty_cache()  # not before the error is gone, which holds tensors
        if not math.isfinite(loss + norm):
            # Resumed, it would come to the same; without it the folder is free for another rate.
            self._checkpoint.unlink(missing_ok=True)
            what = f"gradient became {norm}" if math.isfinite(loss) else f"loss became {loss}"
            narrow = ", or leave --dtype float16" if self._half else ""
            raise UserError(
                f"the {what} at step {step + 1}; lower --learning-rate (now "
                f"{self.config.learning_rate:g}){narrow}"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate_at(
                step, self.steps, self.config.learning_rate, self.config.warmup
            )
        self._optimizer.step()
        history = self.history
        history.tokens += int(self._lengths[list(batch)].sum())
        history.response_tokens += response
        history.loss_sum += loss * response
        history.loss_tokens += response
        return loss

    def _numbers(self, loss: float) -> dict[str, float]:
        """What the trackers get after a step."""
        step = self.history.step
        rate = learning_rate_at(step - 1, self.steps, self.config.learning_rate, self.config.warmup)
        signals = self._signals.take() if self._signals else {}
        return {"loss": loss, "learning_rate": rate, "epoch": step / self._per_epoch, **signals}

    def _gradients(self, batch: Sequence[int], response: int) -> tuple[float, float]:
        """Gradients of the mean loss over the batch's response tokens, clipped.

        Returns that mean and the norm of the gradients before they were clipped.
        """
        self._optimizer.zero_grad(set_to_none=True)
        if self._signals is not None:
            self._signals.take()  # what an attempt that ran out of memory left behind
        loss, scale = 0.0, self.history.loss_scale
        for rows in micro_batches(batch, self._lengths, self._budget):
            part = self.response_loss([self._examples[row] for row in rows]) / response
            (part * scale).backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        for parameter in self._trained.values():
            if scale != 1 and parameter.grad is not None:
                parameter.grad /= scale
        norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), _MAX_GRADIENT_NORM)
        return loss, norm.item()

    def response_loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """Return the sum of -log p over response tokens, logits made where they are needed.

        Rows are padded on the right: under causal attention no token then sees padding, and
        neither a mask nor positions have to be handed to the model. What all rows begin with
        (system prompt, instruction) is computed once; gradients flow through it as usual. Layers
        below the lowest adapted one are computed once a record, not once an epoch.
        """
        shared = shared_prefix(examples) if self._cacheable else 0
        inputs: dict[str, Any] = {"use_cache": False}
        if shared and not self._trunk:
            start = torch.from_numpy(examples[0].ids[:shared]).long().to(self.device)
            cache = self.model(input_ids=start[None], use_cache=True, logits_to_keep=1)
            cache.past_key_values.batch_repeat_interleave(len(examples))
            inputs = {"use_cache": True, "past_key_values": cache.past_key_values}
        width = max(len(example.ids) for example in examples) - shared
        ids = torch.zeros((len(examples), width), dtype=torch.long)  # [rows, width]
        places: list[tuple[int, int]] = []  # (row, column) whose next token is in the response
        for row, example in enumerate(examples):
            length = len(example.ids) - shared
            ids[row, :length] = torch.from_numpy(example.ids[shared:])
            places += [(row, c) for c in range(max(length - example.response - 1, 0), length - 1)]
        ids = ids.to(self.device)
        rows, kept = torch.tensor(places, device=self.device).T
        targets = ids[rows, kept + 1]
        if self._trunk:
            states = self._trunk.states([example.ids for example in examples])
            chosen = self._trunk.logits(states, rows, kept + shared, shared).float()
        else:
            columns, slots = kept.unique(return_inverse=True)
            logits = self.model(input_ids=ids, logits_to_keep=columns, **inputs).logits
            # A model that knows no such choice (xLSTM) gives them all.
            chosen = logits[rows, slots if logits.shape[1] == len(columns) else kept].float()
        if self._signals is not None:
            ends = torch.bincount(rows, minlength=len(examples)).cumsum(0)
            starts = functional.pad(ends, (1, 0))
            self._signals.add(token_stats(chosen.detach(), targets, cu_seqlens=starts))
        return functional.cross_entropy(chosen, targets, reduction="sum")

    # --- checkpoints ---------------------------------------------------------------------------

    def _save(self) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._trained.items():
            tensors[f"weight/{name}"] = parameter.detach()
            # Empty where no gradient came so far, as in an expert that no token was sent to.
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        metadata = {"history": json.dumps(asdict(self.history))}
        with scratch_folder(self._checkpoint) as folder, replacing(self._checkpoint) as path:
            save_file(tensors, folder / path.name, metadata=metadata)
            (folder / path.name).replace(path)

    def _load(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._checkpoint, framework="pt") as stored:
                # What a checkpoint of before does not name is as at the start.
                history = replace(self.history, **json.loads(stored.metadata()["history"]))
                found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            state: dict[int, dict[str, torch.Tensor]] = {}
            for index, (name, parameter) in enumerate(self._trained.items()):
                with torch.no_grad():
                    parameter.copy_(found[f"weight/{name}"])
                if f"exp_avg/{name}" in found:
                    state[index] = {key: found[f"{key}/{name}"] for key in _STATE}
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{self._checkpoint}: not a checkpoint of this run ({error}); delete it to restart"
            ) from error
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.history = history


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many first tokens of their prompts all rows share; 0 where sharing would gain little.

    The token before each response is left out: its logits are needed row by row.
    """
    most = min(len(example.ids) - example.response - 1 for example in examples)
    return shared_start([example.ids for example in examples], most)


class _Interrupt:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step at work.

    A second one has the effect it had before. Outside the main thread, where Python delivers no
    signals, it does nothing.
    """

    def __init__(self) -> None:
        self.came = 0  # the signal's number; 0 where none came
        self._then: Any = None  # what handled it before
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                self._before[name] = signal.signal(name, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came, self._then = number, self._before[signal.Signals(number)]
        self._restore()

    def deliver(self) -> NoReturn:
        """Raise what the handler of before makes of the signal, else KeyboardInterrupt."""
        if callable(self._then):
            self._then(self.came, None)
        raise KeyboardInterrupt

    def _restore(self) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)
        self._before = {}

    def __exit__(self, *error: object) -> None:
        self._restore()
