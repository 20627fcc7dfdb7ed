"""Which packed base a file of scales belongs to."""

from __future__ import annotations

import hashlib
import json
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qtrain.modules.packed_linear import PackedLinear

CHUNK = 2**22


_KNOWN: WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], str]] = WeakKeyDictionary()


def packed_identity(model: nn.Module) -> str:
    """A hash over names, specs and codes of all packed layers; ranges have no part in it.

    Each word enters two sums over the integers mod 2^64, one of them weighted by its position, on the device where it
    lies; SHA-256 over those. It tells bases apart, and is no proof against forgery. Computed again only where a
    layer's words are others, or were written to.
    """
    layers = packed_layers(model)
    state = [(layer.weight.data_ptr(), layer.weight._version) for layer in layers.values()]
    known = _KNOWN.get(model)
    if known is None or known[0] != state:
        digest = hashlib.sha256()
        for name, layer in layers.items():
            parts = [_sums(part.detach()) for part in (layer.weight, layer.outlier_index) if part is not None]
            digest.update(json.dumps([name, layer.in_features, layer.spec.to_dict(), parts]).encode())
        known = _KNOWN[model] = (state, digest.hexdigest()[:32])
    return known[1]


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers by name, without an adapter's names around them."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    return {plain_name(name): layer for name, layer in found.items()}


def plain_name(name: str) -> str:
    """The name that a module or tensor has where no adapter is around it."""
    return name.replace("base_model.model.", "").replace(".base_layer", "")


def _sums(words: Tensor) -> tuple[int, int]:
    plain, weighted = (torch.zeros((), dtype=torch.int64, device=words.device) for _ in range(2))
    flat = words.reshape(-1)
    for first in range(0, flat.numel(), CHUNK):
        part = flat[first : first + CHUNK].to(torch.int64)
        plain += part.sum()
        weighted += (part * torch.arange(first + 1, first + 1 + len(part), device=words.device)).sum()
    return int(plain), int(weighted)
