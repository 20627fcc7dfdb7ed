"""Attention functions, registered with transformers, that quantize keys and values before they hand them on."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from qtrain.errors import ModelError
from qtrain.modules.kv.quantizer import KVQuantizer
from qtrain.modules.kv.residual import seen_pairs, windowed_attention, without_padding

BackEnd = Callable[..., tuple[Tensor, Tensor | None]]
PREFIX = "qtrain_"
WINDOWED = ("sdpa", "eager")
"""Back ends whose masks name each pair of tokens."""


def register(implementation: str) -> str:
    """Make ``qtrain_<implementation>`` known: that back end, with its masks, behind the quantizers of each module.

    A module without a ``kv_quantizer`` (a vision tower's, cross-attention) gets the back end itself.

    Returns:
        The name for ``config._attn_implementation``.
    """
    name = PREFIX + implementation
    if name in ALL_ATTENTION_FUNCTIONS:
        return name

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        quantizer: KVQuantizer | None = getattr(module, "kv_quantizer", None)
        if quantizer is None:
            return back_end(implementation, module)(module, query, key, value, attention_mask, *args, **kwargs)
        if quantizer.window is not None and quantizer.active:
            return _windowed(quantizer, query, key, value, attention_mask, **kwargs)
        if quantizer.reader is None:
            key, value = quantizer(key, value)
        return quantizer.back_end(quantizer.stand_in or module, query, key, value, attention_mask, *args, **kwargs)

    AttentionInterface.register(name, attend)
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def back_end(implementation: str, module: nn.Module) -> BackEnd:
    """What transformers would call for that module: its modelling file's own function, or a registered one."""
    modelling = sys.modules[type(module).__module__]
    if implementation == "eager":
        found: BackEnd | None = getattr(modelling, "eager_attention_forward", None)
        if found is None:
            raise ModelError(
                f"{type(module).__name__} has no eager attention of its own to call", fix="model.attention=sdpa"
            )
        return found
    own = getattr(modelling, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function: BackEnd = own[implementation]
    return function


def stand_in(implementation: str, module: nn.Module) -> SimpleNamespace | None:
    """The module as flash attention reads it: it looks for its own name in the config. None for other back ends."""
    if "flash" not in implementation:
        return None
    config: Any = copy.copy(module.config)
    config._attn_implementation_internal = implementation
    return SimpleNamespace(
        config=config,
        modules=module.modules,
        is_causal=getattr(module, "is_causal", True),
        layer_idx=getattr(module, "layer_idx", None),
    )


def _windowed(
    quantizer: KVQuantizer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise ModelError(
            f"attention with {unknown[0]} and a window of keys and values in full precision",
            where="method.kv_cache.residual",
            rule="scores are scaled, capped, masked and put through a softmax, nothing else",
            fix="method.kv_cache.share=per_head method.kv_cache.residual=0",
        )
    window, length = quantizer.window, key.shape[2]
    assert window is not None
    if quantizer.reader is not None:
        coded_key, coded_value = quantizer.reader.coded
    else:
        key = without_padding(key, seen_pairs(mask))
        coded_key, coded_value = quantizer(key[:, :, : window.keys(length)], value[:, :, : window.values(length)])
    return windowed_attention(
        query,
        key,
        value,
        coded_key,
        coded_value,
        window,
        mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        softcap=softcap,
    )
