"""Outlier channels of keys move into the queries before keys are quantized: the scores stay what they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from qtrain.errors import ModelError
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.prepare import attention_modules, prepare_kv, remove_kv
from qtrain.modules.quantizers import full_precision
from qtrain.ptq.activation_stats import inference
from qtrain.ptq.block_text import BlockText, Context, DecoderText, Progress
from qtrain.ptq.query_key import QueryKey

POWERS = ((0.5, 0.0), (0.75, 0.0), (0.5, 0.25), (0.75, 0.25), (1.0, 0.25), (1.0, 0.5))
"""(a, b) of scales k^a / q^b that are tried. All of SmolLM2 by one pair, int4 keys: none 29.6, (0.5, 0) 28.9,
(0.7, 0.3) 28.6 of 27.0 in full precision; with int4 values too, (1, 0) is worse than none."""


@dataclass(frozen=True)
class Smoothed:
    """Mean squared error of a block's output on text, its keys and values quantized, before and after."""

    name: str
    before: float
    after: float


@torch.no_grad()
def smooth_keys(
    model: PreTrainedModel,
    section: KVCacheSection,
    rows: Sequence[torch.Tensor],
    *,
    context: Context = nullcontext,
    progress: Progress | None = None,
) -> list[Smoothed]:
    """q^T k = (q s)^T (k / s), one s for the two channels that RoPE turns into each other (SmoothAttention: Lin 2024,
    QServe, arXiv 2405.04532).

    s = k^a / q^b of the largest magnitudes on ``rows``, for each key-value head; of ``POWERS`` each block takes those
    with the least error of its output, or none. That s cancels is proven on the block; blocks where it does not stay as
    they are.

    Args:
        model: plain, in fp32; its query and key projections, or the norms after them, are rewritten.
        section: what will become of keys and values; its range is dynamic.
        rows: token ids [b, L].

    Raises:
        ModelError: no block whose queries and keys can be scaled.
    """
    over: Progress = progress or (lambda items, total: items)
    found: list[Smoothed] = []
    prepare_kv(model, section)
    try:
        with inference(model):
            with full_precision(model):
                text = DecoderText.of(model, rows, context, over)
            for k in over(iter(range(len(text.blocks))), len(text.blocks)):
                block = text.at(k, [])
                found += _smooth(block)
                with full_precision(model):
                    text.leave(block)
    finally:
        remove_kv(model)
    if not found:
        raise ModelError(
            f"no attention of {type(model).__name__} has queries and keys whose channels can be scaled",
            where="method.kv_cache.smooth",
            rule="q_proj and k_proj, or the norms q_norm and k_norm, before a rotation of pairs of channels",
            fix="method.kv_cache.smooth=false",
        )
    return found


def _smooth(block: BlockText) -> list[Smoothed]:
    """One block, by the best of ``POWERS``."""
    with full_precision(block.module):
        sources = [QueryKey.of(block, attention) for _, attention in attention_modules(block.module)]
        proven = [source for source in sources if source is not None]
        if not proven:
            return []
        target = list(block.outputs())
        largest = [source.largest(block) for source in proven]

    def error() -> float:
        total = sum(float((y - t).float().square().sum()) for y, t in zip(block.outputs(), target, strict=True))
        return total / sum(t.numel() for t in target)

    def fold(powers: tuple[float, float]) -> None:
        for source, (queries, keys) in zip(proven, largest, strict=True):
            source.fold(QueryKey.scale(queries, keys, powers))

    errors = {}
    before = error()
    for powers in POWERS:
        with _kept(proven):
            fold(powers)
            errors[powers] = error()
    best = min(errors, key=lambda powers: errors[powers])
    if errors[best] < before:
        fold(best)
    return [Smoothed(block.name, before, min(before, errors[best]))]


@contextmanager
def _kept(sources: Sequence[QueryKey]) -> Iterator[None]:
    """Afterwards all numbers are bit by bit those of before."""
    parameters: list[nn.Parameter] = [parameter for source in sources for parameter in source.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
