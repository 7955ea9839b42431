"""Key-value caches: one written in place, as decoding copies no past, and one that is only read."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """transformers' `DynamicLayer`, which concatenates, with room for what is to come.

    Keys and values [batch, heads, tokens, width] are views of a larger tensor.

    Args:
        room: tokens to make room for whenever there is none left.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        self._stores: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the states of new tokens; returns those of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        held: tuple[Any, Any] = (self.keys, self.values)
        # Whoever reorders or crops the cache replaces the views; the stores are then stale.
        stale = not self._stores or any(
            view.data_ptr() != store.data_ptr() or view.stride() != store.stride()
            for view, store in zip(held, self._stores, strict=True)
        )
        if stale or length > self._stores[0].shape[-2]:
            self._stores = []
            for view, new in zip(held, (key_states, value_states), strict=True):
                batch, heads, _, width = new.shape
                store = new.new_empty((batch, heads, length + self._room, width))
                if past:
                    store[..., :past, :] = view
                self._stores.append(store)
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[..., past:length, :] = new
        self.keys, self.values = (store[..., :length, :] for store in self._stores)
        return self.keys, self.values


class PrefixLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A beginning [1, heads, tokens, width] of all rows; what comes after it is not kept."""

    def __init__(self, of: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        keys: Any = of.keys
        self.lazy_initialization(keys, keys)
        self.keys, self.values = of.keys, of.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The beginning and the states given, of every row."""
        held: tuple[Any, Any] = (self.keys, self.values)
        rows = len(key_states)
        keys, values = (
            torch.cat([begin.expand(rows, -1, -1, -1), new], dim=-2)
            for begin, new in zip(held, (key_states, value_states), strict=True)
        )
        return keys, values


def as_prefix(cache: DynamicCache) -> DynamicCache:
    """`cache` of one row, for any number of rows that go on from it in a single pass."""
    layers: list[Any] = cache.layers
    cache.layers = [PrefixLayer(layer) for layer in layers]
    return cache


def growing_cache(model: Any, room: int) -> DynamicCache | None:
    """An empty cache for `model`, its full-attention layers growing in place.

    None where the model keeps its past in a form of its own; layers that slide stay as they are.
    """
    taken = "past_key_values" in inspect.signature(model.forward).parameters  # Mamba has another
    if not taken or not getattr(model, "_supports_default_dynamic_cache", lambda: False)():
        return None
    cache = DynamicCache(config=model.config)
    if not cache.layers:
        return None
    cache.layers = [
        GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
