"""A key-value cache that is laid out once and returns only what is filled."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values [B, heads, length, head_dim], written in place; ``update`` returns views of the filled part.

    A ``DynamicLayer`` copies all that it holds at each token. A ``StaticLayer`` returns its whole length, so that
    attention needs a mask, and with a mask transformers first repeats keys and values for each query head.

    Args:
        length: tokens it has room for.
    """

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for ``length`` tokens in the shape, type and place of the first ones."""
        super().lazy_initialization(key_states, value_states)
        self._key_room = key_states.new_empty(*key_states.shape[:2], self.length, key_states.shape[3])
        self._value_room = value_states.new_empty(*value_states.shape[:2], self.length, value_states.shape[3])
        self.keys, self.values = self._key_room[:, :, :0], self._value_room[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind those that are there; keys and values of all, [B, heads, filled, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        self._key_room[:, :, begin:end] = key_states
        self._value_room[:, :, begin:end] = value_states
        self.keys, self.values = self._key_room[:, :, :end], self._value_room[:, :, :end]
        return self.keys, self.values


def preallocated_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """The cache transformers would use for ``model``, with room for ``length`` tokens in its full-attention layers.

    Sliding windows and recurrent states stay as they are: they do not grow.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
