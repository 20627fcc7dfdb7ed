"""A transformers cache that stores codes: decoding with it sees what training saw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import nn
from transformers.cache_utils import Cache

from qtrain.errors import ModelError
from qtrain.modules.kv.layer import CodedLayer, RotatedLayer, WindowedLayer
from qtrain.modules.kv.quantizer import KVQuantizer
from qtrain.modules.kv.rotation import Angles


class QuantizedCache(Cache):
    """Codes, scales and zero points of every layer's keys and values; 4-bit and 2-bit codes packed.

    What attention reads is bit for bit what the quantizers of ``prepare_kv`` give it in training. Each read maps all
    codes back to numbers: the cache is for memory and for truth, not for speed. Used through ``quantized_cache``.

    Raises:
        ModelError: layers without quantizers, or layers that share keys and values with others.
    """

    def __init__(self, model: nn.Module) -> None:
        self.attentions = [
            module for module in model.modules() if isinstance(getattr(module, "kv_quantizer", None), KVQuantizer)
        ]
        angles: list[Angles] = []
        layers: dict[int, CodedLayer] = {}
        for attention in self.attentions:
            _check(attention)
            layers[cast(int, attention.layer_idx)] = _layer(attention, angles)
        config: Any = self.attentions[0].config if self.attentions else getattr(model, "config", None)
        count = getattr(config, "num_hidden_layers", len(layers))
        if not layers or sorted(layers) != list(range(count)):
            raise ModelError(
                f"{len(layers)} of {count} layers have quantizers of keys and values",
                rule="a cache of codes holds every layer",
                fix="prepare_kv(model, section)" if not layers else None,
            )
        self.coded = [layers[index] for index in range(count)]
        super().__init__(layers=list(self.coded))

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales, zero points, tokens in full precision, angles."""
        return sum(layer.nbytes for layer in self.coded)

    @property
    def compression(self) -> float:
        """Bytes of the same keys and values in 16 bits, divided by ``nbytes``."""
        return 2 * sum(layer.numel for layer in self.coded) / max(1, self.nbytes)


@contextmanager
def quantized_cache(model: nn.Module) -> Iterator[QuantizedCache]:
    """An empty cache for ``model(..., past_key_values=cache)`` and ``model.generate``, while the context lasts.

    Each forward of an attention module that is given the cache takes keys and values from its codes; any other is the
    training graph's.
    """
    cache = QuantizedCache(model)
    handles = [
        attention.register_forward_pre_hook(
            partial(_enter, cache, cache.coded[cast(int, attention.layer_idx)]), with_kwargs=True
        )
        for attention in cache.attentions
    ]
    try:
        yield cache
    finally:
        for handle in handles:
            handle.remove()
        for attention in cache.attentions:
            cast(KVQuantizer, attention.kv_quantizer).reader = None


def _enter(
    cache: QuantizedCache, layer: CodedLayer, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    given = any(argument is cache for argument in (*args, *kwargs.values()))
    layer.quantizer.reader = layer if given else None
    if given:
        layer.enter(kwargs)


def _layer(attention: nn.Module, angles: list[Angles]) -> CodedLayer:
    quantizer = cast(KVQuantizer, attention.kv_quantizer)
    if quantizer.sites:
        return RotatedLayer(attention, quantizer, angles)
    if quantizer.window is not None and quantizer.active:
        return WindowedLayer(attention, quantizer)
    return CodedLayer(attention, quantizer)


def _check(attention: nn.Module) -> None:
    if getattr(attention.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(attention).__name__} is of an encoder-decoder",
            rule="a cache of codes is a decoder's own: it holds no cross-attention",
        )
    if getattr(attention, "is_kv_shared_layer", False):
        raise ModelError(
            f"layer {attention.layer_idx} of {type(attention).__name__} attends to another layer's keys and values",
            rule="a cache of codes holds every layer's own",
        )
