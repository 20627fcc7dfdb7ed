"""Put quantizers on the keys and values of a model, find them again, and take them off."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qtrain.errors import ModelError
from qtrain.modules.kv.attention import PREFIX, WINDOWED, back_end, register, stand_in
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.quantizer import KVQuantizer
from qtrain.modules.kv.sites import find_sites
from qtrain.modules.quantizer import Quantizer

CHILD = "kv_quantizer"


def prepare_kv(model: nn.Module, section: KVCacheSection) -> list[str]:
    """Fake-quantize the keys and values of every decoder self-attention of ``model``.

    Each attention module gets a child ``kv_quantizer``. Rotated keys are quantized in an attention function that wraps
    the model's own (``config._attn_implementation`` becomes ``qtrain_sdpa``, ...), others by hooks on the modules whose
    outputs they are; so layers are swapped and adapters added before this. A static or learned range is calibrated
    afterwards (``observe`` and ``settle`` of each of ``kv_quantizers``).

    Args:
        model: a decoder of transformers, alone or wrapped.

    Returns:
        The names of the attention modules.

    Raises:
        ModelError: no such attention, one that does not use transformers' attention interface, keys and values
            that are no tensors of heads, or a back end or projection that the section does not fit.
    """
    found = dict(attention_modules(model))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no self-attention that caches keys and values", where="method.kv_cache"
        )
    for name, attention in found.items():
        _check(name, attention)
    if section.site == "post_rope" and not _dispatches(model, found):
        raise ModelError(
            f"{type(model).__name__} does not take its attention function from transformers' attention interface",
            where="method.kv_cache.site=post_rope",
            fix="method.kv_cache.site=pre_rope",
        )
    for attention in found.values():
        quantizer = KVQuantizer(section)
        quantizer.to(next(attention.parameters()).device)
        quantizer.train(attention.training)
        if section.site == "pre_rope":
            _hook(attention, quantizer)
        else:
            _wrap(attention, quantizer)
        attention.add_module(CHILD, quantizer)
    return list(found)


def kv_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(name, quantizer) of all keys and values, to enable, disable, calibrate and schedule."""
    for name, module in model.named_modules():
        if isinstance(module, KVQuantizer):
            yield f"{name}.key", module.key
            yield f"{name}.value", module.value


def remove_kv(model: nn.Module) -> None:
    """Undo ``prepare_kv``: no quantizers, no hooks, the attention implementation of before."""
    for module in model.modules():
        quantizer = getattr(module, CHILD, None)
        if not isinstance(quantizer, KVQuantizer):
            continue
        for handle in quantizer.handles:
            handle.remove()
        delattr(module, CHILD)
        config: Any = module.config
        config._attn_implementation_internal = config._attn_implementation.removeprefix(PREFIX)


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every self-attention that sees the past only, and so is worth a cache."""
    for name, module in model.named_modules():
        if (
            "Attention" in type(module).__name__
            and isinstance(getattr(module, "layer_idx", None), int)
            and getattr(module, "config", None) is not None
            and getattr(module, "is_causal", True)
            and not getattr(module, "is_cross_attention", False)
        ):
            yield name, module


def has_cache_scales(model: nn.Module) -> bool:
    """Whether its attentions quantize keys and values by scales of the checkpoint: compressed-tensors' do."""
    return any(
        isinstance(getattr(attention, "k_scale", None), nn.Parameter) for _, attention in attention_modules(model)
    )


def _check(name: str, attention: nn.Module) -> None:
    if hasattr(attention, CHILD):
        raise ModelError(
            f"{name} has quantizers of keys and values already", fix="remove_kv(model), then prepare_kv(model, section)"
        )
    if hasattr(attention, "kv_a_proj_with_mqa") or hasattr(attention, "kv_b_proj"):
        raise ModelError(
            f"{name} is a {type(attention).__name__}, which caches one latent vector a token",
            where="method.kv_cache",
            rule="keys and values are quantized as heads",
        )


def _dispatches(model: nn.Module, found: dict[str, nn.Module]) -> bool:
    """Whether the models that hold these modules go through the interface, as transformers itself decides it."""
    owners = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    files = {type(attention).__module__ for attention in found.values()}
    return all(owner._can_set_attn_implementation() for owner in owners if type(owner).__module__ in files)


def _wrap(attention: nn.Module, quantizer: KVQuantizer) -> None:
    config: Any = attention.config
    implementation = str(config._attn_implementation or "eager").removeprefix(PREFIX)
    if quantizer.window is not None and implementation not in WINDOWED:
        raise ModelError(
            f"attention {implementation} with keys and values of which some stay in full precision",
            where="method.kv_cache.residual",
            rule="each query sees other tokens in full precision: that takes scores in memory",
            fix="model.attention=sdpa",
        )
    quantizer.back_end = back_end(implementation, attention)
    quantizer.stand_in = stand_in(implementation, attention)
    config._attn_implementation_internal = register(implementation)


def _hook(attention: nn.Module, quantizer: KVQuantizer) -> None:
    quantizer.sites = find_sites(attention)
    for site in quantizer.sites:
        quantizer.handles.append(site.module.register_forward_hook(partial(quantizer.at_site, site)))
    quantizer.handles.append(attention.register_forward_pre_hook(quantizer.check_sites))
