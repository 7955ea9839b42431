"""The layers below the lowest adapted one: their output never changes, so it is computed once.

With `top_layers` set, most of a forward pass repeats in every epoch what it computed in the first,
and most of an evaluation what it computed for another adapter. A `FrozenTrunk` keeps those hidden
states by token ids, for everything that is done with one model in one process.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_MOST_BYTES = 2 << 30  # hidden states kept; what does not fit is computed again every time
_CACHES: dict[tuple[str, ...], dict[bytes, torch.Tensor]] = {}


class FrozenTrunk:
    """Hidden states at the entry of the lowest layer that trains.

    Parameters
    ----------
    model: a causal language model, an adapter attached to it or not.
    depth: how many lower layers are frozen.
    identity: what tells this model from others; trainings that share it share the states.
    """

    def __init__(self, model: Any, depth: int, identity: tuple[str, ...]) -> None:
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._decoder = self._base.get_decoder()
        self._depth = depth
        key = (*identity, str(depth))
        if key not in _CACHES:
            _CACHES.clear()  # one model at a time
        self._states = _CACHES.setdefault(key, {})
        self._kept = sum(_bytes(states) for states in self._states.values())

    @classmethod
    def of(cls, model: Any) -> FrozenTrunk | None:
        """The trunk of `model`; None where no layer is frozen, or skipping layers changes logits.

        Architectures differ in what happens around their layers; asking the model itself is safer
        than a list of their names.
        """
        depth = _frozen_layers(model)
        if depth == 0:
            return None
        try:
            trunk = cls(model, depth, model_identity(model))
            training = model.training
            model.eval()
            ids = np.arange(2, 10, dtype=np.int32) % int(
                trunk._base.config.get_text_config().vocab_size
            )
            last = torch.arange(4, len(ids), device=trunk.device)
            with torch.no_grad():
                batch = torch.from_numpy(ids).long()[None].to(trunk.device)
                whole = trunk._base(input_ids=batch, use_cache=False).logits[0, last].float()
                states = trunk._below([ids])[0].to(trunk.device)[None]
                parts = [trunk.logits(states, torch.zeros_like(last), last, n) for n in (0, 4)]
            model.train(training)
        except (AttributeError, TypeError, RuntimeError, IndexError):
            return None
        limit = 0.01 * float(whole.abs().max()) + 1e-6  # bfloat16 sums in another order
        return trunk if all((whole - p.float()).abs().max() <= limit for p in parts) else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self._base.parameters()).device
        return device

    def states(self, sequences: Sequence[NDArray[np.int32]]) -> torch.Tensor:
        """[rows, longest, hidden] states of token sequences, zero beyond a sequence's end."""
        found: dict[int, torch.Tensor] = {}
        missing = []
        for row, ids in enumerate(sequences):
            stored = self._states.get(ids.tobytes())
            if stored is None:
                missing.append(row)
            else:
                found[row] = stored
        if missing:
            fresh = self._below([sequences[row] for row in missing])
            for row, states in zip(missing, fresh, strict=True):
                found[row] = states
                if self._kept + _bytes(states) <= _MOST_BYTES:
                    self._states[sequences[row].tobytes()] = states
                    self._kept += _bytes(states)
        rows = [found[row] for row in range(len(sequences))]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)

    def logits(
        self, states: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, shared: int = 0
    ) -> torch.Tensor:
        """Logits [places, vocabulary] at (rows, columns) of the trunk's states.

        The first `shared` columns, the same in all rows and before `columns`, are computed once.
        Only the wanted places reach the output embedding, as a matrix: handed three dimensions
        with gaps, PyTorch copies the weight for every row.
        """
        inputs: dict[str, Any] = {"use_cache": False}
        with self._layers(slice(self._depth, None)):
            if shared:
                start = self._decoder(inputs_embeds=states[:1, :shared], use_cache=True)
                start.past_key_values.batch_repeat_interleave(len(states))
                inputs = {"use_cache": True, "past_key_values": start.past_key_values}
            hidden = self._decoder(inputs_embeds=states[:, shared:], **inputs).last_hidden_state
        logits: torch.Tensor = self._base.get_output_embeddings()(hidden[rows, columns - shared])
        return logits

    def _below(self, sequences: Sequence[NDArray[np.int32]]) -> list[torch.Tensor]:
        """[tokens, hidden] on the CPU for each sequence, by the frozen layers."""
        width = max(len(ids) for ids in sequences)
        batch = torch.zeros((len(sequences), width), dtype=torch.long)
        for row, ids in enumerate(sequences):
            batch[row, : len(ids)] = torch.from_numpy(ids)
        norm, training = self._decoder.norm, self._decoder.training
        # Kept states may be used in training, where tensors of inference mode may not.
        with torch.inference_mode(False), torch.no_grad(), self._layers(slice(0, self._depth)):
            self._decoder.norm = torch.nn.Identity()
            self._decoder.eval()  # what is kept must not be one draw of a dropout
            try:
                output = self._decoder(input_ids=batch.to(self.device), use_cache=False)
            finally:
                self._decoder.norm = norm
                self._decoder.train(training)
        states = output.last_hidden_state.cpu()
        return [states[row, : len(ids)].clone() for row, ids in enumerate(sequences)]

    @contextlib.contextmanager
    def _layers(self, part: slice) -> Iterator[None]:
        """The decoder reduced to some of its layers, numbered from 0 as a cache expects."""
        layers = self._decoder.layers
        self._decoder.layers = torch.nn.ModuleList(layers[part])
        self._number(self._decoder.layers)
        try:
            yield
        finally:
            self._decoder.layers = layers
            self._number(layers)

    @staticmethod
    def _number(layers: Any) -> None:
        for index, layer in enumerate(layers):
            layer.self_attn.layer_idx = index


def _frozen_layers(model: Any) -> int:
    """How many of the lowest layers have no parameter of an adapter."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(getattr(base, "get_decoder", lambda: None)(), "layers", None)
    kinds = getattr(base.config.get_text_config(), "layer_types", None) or ()
    if layers is None or len(set(kinds)) > 1:  # a layer's mask may be told by its position
        return 0
    for depth, layer in enumerate(layers):
        if any(_adapted(name, parameter) for name, parameter in layer.named_parameters()):
            return depth
    return 0


def model_identity(model: Any) -> tuple[str, ...]:
    """What tells this model from any other: its class, settings, and a sample of every weight."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    digest = hashlib.blake2b(base.config.to_json_string().encode(), digest_size=16)
    for name, weight in base.named_parameters():
        if not _adapted(name, weight):
            sample = weight.detach().flatten()[:64].float().cpu().numpy()
            digest.update(name.encode() + sample.tobytes())
    first = next(base.parameters())
    return type(base).__name__, str(first.dtype), str(first.device), digest.hexdigest()


def _adapted(name: str, parameter: Any) -> bool:
    """Whether a parameter trains, or was trained beside the model's own weights."""
    return bool(parameter.requires_grad) or "lora_" in name


def _bytes(states: torch.Tensor) -> int:
    return states.numel() * states.element_size()
