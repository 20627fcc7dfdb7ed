"""Ranges of keys and values as tensors of the checkpoint: ``self_attn.k_scale`` and ``self_attn.v_scale``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain

from torch import Tensor

from qtrain.modules.deployed import DeployedCache, DeployedModel, DeployedTensor

PARTS = ("k_scale", "v_scale")


def with_cache_scales(model: DeployedModel) -> DeployedModel:
    """The same model whose tensors end with the scales [1] of its cache, without the note that they are in no file."""
    cache = model.cache
    assert cache is not None
    return replace(
        model,
        tensors=lambda: chain(model.tensors(), _tensors(cache)),
        notes=tuple(note for note in model.notes if note != cache.note),
    )


def scales_of(cache: DeployedCache) -> Iterator[tuple[str, Tensor]]:
    """(name, scale [1]) of all layers."""
    for name, ranges in cache.ranges.items():
        for part, qparams in zip(PARTS, ranges, strict=True):
            yield f"{name}.{part}", qparams.scale.detach().reshape(1)


def _tensors(cache: DeployedCache) -> Iterator[DeployedTensor]:
    for name, scale in scales_of(cache):
        yield DeployedTensor(name, (1,), False, partial(_itself, scale))


def _itself(scale: Tensor) -> Tensor:
    return scale
