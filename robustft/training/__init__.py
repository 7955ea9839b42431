"""LoRA fine-tuning on D_clean and D_select (eq. 9), and loading what it made."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import robustft
from robustft.config import TrainConfig
from robustft.devices import pick_device, pick_dtype
from robustft.errors import UserError
from robustft.files import remove_leftovers, spare, spare_others, write_atomically
from robustft.models import (
    DEFAULT_MODEL,
    content_digest,
    context_window,
    find_model,
    load_causal_lm,
    load_tokenizer,
)
from robustft.next_steps import to_evaluate
from robustft.records import Record, RecordSource, Reject, leave_out, open_records, watched
from robustft.store import folder_lock, refuse_changes
from robustft.terminal import counted, plural_of
from robustft.training import trackers
from robustft.training.adapter import SETTINGS, WEIGHTS, attach_adapter, load_adapter, save_adapter
from robustft.training.data import TrainingSet, encode_records
from robustft.training.loop import History, TrainingLoop
from robustft.training.scratch import SCRATCH

__all__ = ["TrainResult", "load_adapter", "train"]

_log = logging.getLogger("robustft")
_STATE, _CHECKPOINT = "training.json", "checkpoint.safetensors"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What `train` did."""

    out: Path
    model: str
    records: int
    rejected: int
    shortened: int  # records cut to the cutoff
    trained_parameters: int
    history: History
    resumed: int = 0  # steps already done when this call began
    schema: str | None = None  # as the input's was given

    def __str__(self) -> str:
        """The closing summary of the command line."""
        steps = self.history.step
        losses = ", ".join(f"{loss:.4f}" for loss in self.history.epoch_losses)
        there = "the adapter was there already; " if self.resumed == steps else ""
        before = ", earlier sessions included" if self.resumed else ""
        lines = [
            f"{counted(self.records, 'record')}: {there}trained in {counted(steps, 'step')} on "
            f"{self.history.tokens:,} tokens"
        ]
        if self.rejected:
            lines.append(f"left out      {counted(self.rejected, 'record')} that could not be read")
        if self.shortened:
            lines.append(f"cut           {counted(self.shortened, 'record')}, to the cutoff")
        model = None if self.model == DEFAULT_MODEL else self.model
        lines += [
            f"loss          {losses}  (nats per response token, mean of each epoch)",
            f"adapter       {self.out}  ({self.trained_parameters:,} parameters)",
            f"took          {self.history.seconds:,.0f} s{before}",
            f"next:\n  {to_evaluate(self.out, model, self.schema)}",
        ]
        return "\n".join(lines)


def train(config: TrainConfig, *, title: str = "train") -> TrainResult:
    """Fine-tune a LoRA adapter on the responses of `config.input` and write it to `config.out`.

    The folder receives `adapter_model.safetensors` and `adapter_config.json` (peft's layout), a
    README.md, `training.json` and, while training, `checkpoint.safetensors`. Called again with
    the same configuration it resumes; a finished run returns at once. `title` names the progress.

    Raises:
        UserError: the input or the model cannot be read, a setting does not fit the model, or the
            folder holds a run with another configuration (the differences are named).
        KeyboardInterrupt: on SIGINT or SIGTERM, after the step at work was saved.
    """
    trackers.require(config.report_to)
    source = open_records(
        config.input, schema=config.schema, limit=config.limit, split=config.split
    )
    spare(config.out, config.input)
    model_source = find_model(config.engine.model)
    device = pick_device(config.engine.device)
    identity = config.fingerprint() | {
        "input": source.content_hash,
        "model": model_source.name,
        "revision": content_digest(model_source),
        "device": device.type,
    }
    with folder_lock(config.out):
        remove_leftovers(config.out, SCRATCH, _CHECKPOINT)
        finished = _finished(config.out, identity)
        if finished is not None:
            return finished
        tokenizer = load_tokenizer(model_source)
        dtype = pick_dtype(config.engine.dtype, device, training=True)
        model = load_causal_lm(model_source, dtype=dtype, attention=config.engine.attention)
        config = replace(config, cutoff=min(config.cutoff, context_window(model)))
        data, rejected = _read(source, tokenizer, config.cutoff)
        adapted = attach_adapter(model, config, model_source.name).to(device)
        loop = TrainingLoop(adapted, data, config, config.out / _CHECKPOINT)
        loop.resume()
        resumed = loop.history.step
        _write_state(config.out, identity)  # no earlier, so that a mistake leaves the folder free
        with trackers.opened(config.report_to, config.out, identity, resumed=resumed > 0) as report:
            history = loop.run(report, title)
        result = TrainResult(
            out=config.out,
            model=model_source.name if config.engine.model is None else config.engine.model,
            records=len(data.examples),
            rejected=rejected,
            shortened=data.shortened,
            trained_parameters=loop.trained_parameters,
            resumed=resumed,
            history=history,
            schema=config.schema,
        )
        save_adapter(adapted, config.out)
        write_atomically(config.out / "README.md", _readme(config, result, model_source.name))
        _write_state(config.out, identity, result)
        (config.out / _CHECKPOINT).unlink(missing_ok=True)
    return result


# --- the folder --------------------------------------------------------------------------------


def _finished(out: Path, identity: dict[str, Any]) -> TrainResult | None:
    """The result of this run, if it is finished; UserError where `out` is another's.

    A run that has saved no step does not hold its folder.
    """
    path = out / _STATE
    if not path.exists():
        if (out / WEIGHTS).exists():
            raise UserError(f"{out}: holds an adapter that robustft did not train; choose another")
        spare_others([out / "README.md", out / SETTINGS])
        return None
    with _undamaged(path):
        state = json.loads(path.read_text(encoding="utf-8"))
        before, result = dict(state["identity"]), state.get("result")
    if result is None and not (out / _CHECKPOINT).exists():
        return None
    refuse_changes(out, before, identity)
    if result is None or not (out / WEIGHTS).exists():
        return None
    with _undamaged(path):
        history = History(**result["history"])
        return TrainResult(**result | {"out": out, "history": history, "resumed": history.step})


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the state of a training run ({error})") from error


def _write_state(out: Path, identity: dict[str, Any], result: TrainResult | None = None) -> None:
    state: dict[str, Any] = {"identity": identity}
    if result is not None:
        state["result"] = asdict(result) | {"out": str(out)}
    write_atomically(out / _STATE, _json(state))


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _readme(config: TrainConfig, result: TrainResult, model: str) -> str:
    layers = "all layers" if config.top_layers is None else f"the top {config.top_layers} layers"
    losses = ", ".join(f"{loss:.4f}" for loss in result.history.epoch_losses)
    cut = f"{counted(result.shortened, 'record')} {plural_of(result.shortened, 'was', 'were')} cut"
    return f"""---
library_name: peft
base_model: {model}
tags: [lora, robustft]
---
# LoRA adapter for {model}

Trained by [robustft](https://arxiv.org/abs/2412.14922) {robustft.__version__} on
{counted(result.records, "record")} of `{Path(config.input).name}`, loss on the response tokens
only.

| setting | value |
| --- | --- |
| rank, alpha, dropout | {config.rank}, {config.scale:g}, {config.dropout:g} |
| target | all linear layers of {layers} |
| steps, records a step | {result.history.step:,}, {config.batch_size} |
| learning rate | {config.learning_rate:g}, cosine, warm-up {config.warmup:g} |
| cutoff | {config.cutoff} tokens ({cut}) |
| seed | {config.seed} |
| mean loss of each epoch | {losses} nats per response token |

`adapter_model.safetensors` and `adapter_config.json` are in peft's own layout. Prompts must be
rendered as in training: `robustft eval TEST_FILE --model MODEL --adapter {config.out.name}` does.
"""


# --- small choices -----------------------------------------------------------------------------


def _read(source: RecordSource, tokenizer: Any, cutoff: int) -> tuple[TrainingSet, int]:
    """The tokenised training set and the number of records that could not be read."""
    rejected = 0

    def readable() -> Iterator[Record]:
        nonlocal rejected
        for item in watched(source, "read"):
            if isinstance(item, Reject):
                rejected = leave_out(item, source, rejected)
            else:
                yield item

    data = encode_records(readable(), tokenizer, cutoff)
    if data.shortened:
        are = plural_of(data.shortened, "is", "are")
        _log.warning(
            "%s %s longer than %d tokens and %s cut",
            counted(data.shortened, "record"), are, cutoff, are,
        )  # fmt: skip
    return data, rejected
