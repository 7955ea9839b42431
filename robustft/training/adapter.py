"""LoRA adapters: attached for training, written and read as safetensors in peft's own layout.

The only module that imports peft. A pickled adapter is refused, and so is any setting that is not
understood.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from robustft.config import TrainConfig
from robustft.errors import UserError
from robustft.files import replacing
from robustft.terminal import printable
from robustft.training.scratch import scratch_folder

_log = logging.getLogger("robustft")
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
# Fields of peft's LoraConfig that say what an adapter computes …
_UNDERSTOOD = (
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
    "fan_in_fan_out", "modules_to_save",
)  # fmt: skip
# … and that do not matter once it is trained. Anything else that is set is refused by name.
_IRRELEVANT = (
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path",
    "revision", "inference_mode", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "megatron_config", "megatron_core",
    "qalora_group_size",
)  # fmt: skip
# What peft, which hardly checks its settings, makes of one that is of no use.
_BAD_SETTING = (TypeError, ValueError, AttributeError, LookupError, re.error)


def attach_adapter(model: Any, config: TrainConfig, model_name: str) -> Any:
    """`model` with a fresh LoRA adapter on its text decoder's linear layers, or the top ones'.

    Adapter weights are float32 whatever the model's dtype; first weights follow `config.seed`.

    Raises:
        UserError: `top_layers` exceeds the model's layers, or peft cannot adapt the model.
    """
    from peft import LoraConfig

    layers = int(model.config.get_text_config().num_hidden_layers)
    top = config.top_layers
    if top is not None and top > layers:
        raise UserError(f"top_layers must be in [1, {layers}] for {model_name}, got {top}")
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.scale,
        lora_dropout=config.dropout,
        target_modules=linear_names(model),
        exclude_modules=_beside_decoder(model),
        layers_to_transform=None if top is None else list(range(layers - top, layers)),
    )
    torch.manual_seed(config.seed)
    try:
        adapted = _attached(model, settings)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{model_name}: LoRA does not take this model: {reason}") from error
    # A name that means something on another machine, where a cache folder does not.
    adapted.peft_config["default"].base_model_name_or_path = model_name
    return adapted


def _attached(model: Any, settings: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers, not ours
        warnings.simplefilter("ignore", UserWarning)  # GPT-2's transposed layers: peft adapts
        return get_peft_model(model, settings)


def linear_names(model: Any) -> list[str]:
    """Last name parts (q_proj, up_proj …) of the text decoder's linear layers, without the head.

    What peft calls "all-linear", as a list, because only a list can be limited to some layers.
    """
    return sorted({name.rpartition(".")[2] for name in _linears(model, model.get_decoder())})


def _beside_decoder(model: Any) -> str | None:
    """A pattern of all modules outside the text decoder; None where no name is met there, too.

    Text sends no gradient through a vision tower, whose layers may be named as the decoder's are.
    """
    decoder = model.get_decoder()
    inside = next((name for name, module in model.named_modules() if module is decoder), "")
    names = set(linear_names(model))
    outside = (name for name in _linears(model, model) if not name.startswith(f"{inside}."))
    met = inside and any(name.rpartition(".")[2] in names for name in outside)
    return rf"(?!{re.escape(inside)}\.).*" if met else None


def _linears(model: Any, part: Any) -> Iterator[str]:
    """Names of the linear layers in a part of the model that an adapter may stand beside.

    Not its output embedding; not a router that answers with more than one tensor (Llama 4, Phi
    MoE); not what Mamba's kernels read the weight of without calling the layer; not one named by
    a number alone (Zamba 2), as whole blocks are.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for name, module in part.named_modules():
        linear = isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        if linear and not type(module).__name__.endswith("Router"):
            above, _, own = name.rpartition(".")
            read = own == "out_proj" and _is_mamba(part.get_submodule(above))
            if not read and not own.isdigit():
                yield name


def _is_mamba(module: Any) -> bool:
    return hasattr(module, "A_log") and hasattr(module, "D")


def load_adapter(model: Any, folder: Path, model_name: str | None = None) -> Any:
    """`model` with the LoRA adapter in `folder` applied, in evaluation mode.

    The adapter is merged into float32 weights, which is exact to rounding and faster; over
    weights of lower precision, or one that serves as both embeddings, it stays beside them. Only
    safetensors are read, and only settings that are understood: nothing in the folder can name
    code to run. Of a model whose `model_name` is not the one that the adapter was trained for, the
    log warns: shapes may agree.

    Raises:
        UserError: no adapter there, a pickled one, or one that does not fit the model.
    """
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = read_settings(folder)
    base = settings.base_model_name_or_path
    if model_name and base and Path(str(base)).name != Path(model_name).name:
        _log.warning(
            "%s: the adapter was trained for %s, as its settings say, not for %s; if that is "
            "another model, its answers mean nothing",
            folder, printable(str(base)), model_name,
        )  # fmt: skip
    try:
        weights = load_file(folder / WEIGHTS)
        adapted = _attached(model, settings)
        loaded: Any = set_peft_model_state_dict(adapted, weights)
    except (SafetensorError, OSError, RuntimeError, *_BAD_SETTING) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: the adapter does not fit the model: {reason}") from error
    strange = list(loaded.unexpected_keys)
    lacking = [name for name in loaded.missing_keys if "lora_" in name]
    if strange or lacking:
        what = f"lacks {lacking[0]}" if lacking else f"has {strange[0]}"
        raise UserError(f"{folder}: the adapter does not fit the model: it {what}")
    if next(model.parameters()).dtype == torch.float32 and not _adapts_tied(model):
        return adapted.merge_and_unload().eval()
    return adapted.get_base_model().eval()


def _adapts_tied(model: Any) -> bool:
    """Whether one embedding is adapted that is tied to the other, which is not to change."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    return tied and any(hasattr(end, "lora_A") for end in ends)


def read_settings(folder: Path) -> Any:
    """The adapter's peft LoraConfig; UserError where it is none, pickled or not understood."""
    from peft import LoraConfig

    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: expected a LoRA adapter ({SETTINGS}), found none")
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").exists():
            raise UserError(
                f"{folder}: expected {WEIGHTS}, found adapter_model.bin, a pickle checkpoint, "
                "which can run code and is refused"
            )
        raise UserError(f"{folder}: expected {WEIGHTS}, found none; is training unfinished?")
    path = folder / SETTINGS
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, found: {error}") from error
    kind = stored.get("peft_type") if isinstance(stored, dict) else None
    if kind != "LORA":
        raise UserError(f"{path}, field 'peft_type': expected LORA, found {kind!r}")
    default = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    for name, value in stored.items():
        known = name in _UNDERSTOOD or name in _IRRELEVANT
        if not known and value and value != default.get(name):
            raise UserError(f"{path}, field {name!r}: {value!r} is not supported")
    try:
        return LoraConfig(
            **{name: stored[name] for name in _UNDERSTOOD if name in stored},
            base_model_name_or_path=stored.get("base_model_name_or_path"),
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
    except _BAD_SETTING as error:
        raise UserError(f"{path}: {error}") from error


def save_adapter(adapted: Any, out: Path) -> None:
    """Write the adapter in peft's layout, each file in one step, the weights last."""
    with scratch_folder(out / WEIGHTS) as folder:
        adapted.save_pretrained(folder, save_embedding_layers=False)
        for name in (SETTINGS, WEIGHTS):
            with replacing(out / name) as temporary:
                shutil.copyfile(folder / name, temporary)
