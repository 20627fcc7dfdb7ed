"""Before keys are quantized, what makes their range wide moves into the queries: the scores stay what they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from qtrain.errors import ModelError
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.prepare import CHILD, attention_modules, prepare_kv, remove_kv
from qtrain.modules.kv.quantizer import KVQuantizer
from qtrain.modules.kv.sites import key_heads
from qtrain.modules.quantizers import full_precision
from qtrain.ptq.activation_stats import inference
from qtrain.ptq.block_text import BlockText, Context, DecoderText, Progress
from qtrain.ptq.key_search import Span, search, span_of
from qtrain.ptq.query_key import QueryKey


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
    """Each block's ``KeyFold``: scales and turns that cancel in the scores and make its quantized keys lose less.

    They are searched on ``rows``, for each key-value head; a block whose output they do not bring nearer to what it was
    stays as it is, and so does one on which it is not proven that they cancel.

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
                found += _smooth(block, section)
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


def _smooth(block: BlockText, section: KVCacheSection) -> list[Smoothed]:
    """One block."""
    with full_precision(block.module):
        found = [(attention, QueryKey.of(block, attention)) for _, attention in attention_modules(block.module)]
        proven = [(attention, source) for attention, source in found if source is not None]
        if not proven:
            return []
        target = list(block.outputs())
        sizes = [source.sizes(block) for _, source in proven]

    def error() -> float:
        total = sum(float((y - t).float().square().sum()) for y, t in zip(block.outputs(), target, strict=True))
        return total / sum(t.numel() for t in target)

    with _keys([attention for attention, _ in proven]) as keys:
        before = error()
    changes = [
        (source, search(keys[attention], size, source.pair, _span(section), turns=source.turns))
        for (attention, source), size in zip(proven, sizes, strict=True)
    ]
    kept = [parameter for source, _ in changes for parameter in source.parameters()]
    values = [parameter.detach().clone() for parameter in kept]
    for source, change in changes:
        source.fold(change)
    after = error()
    if not after < before:  # NaN too
        for parameter, value in zip(kept, values, strict=True):
            parameter.copy_(value)
    return [Smoothed(block.name, before, min(before, after))]


def _span(section: KVCacheSection) -> Span:
    return span_of(section.key_section().symmetric, section.group_size, section.shared == "per_token")


@contextmanager
def _keys(attentions: Sequence[nn.Module]) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Afterwards what was quantized as keys within, [tokens, H, D] in fp32."""
    taken: dict[nn.Module, list[torch.Tensor]] = {attention: [] for attention in attentions}
    found: dict[nn.Module, torch.Tensor] = {}

    def take(attention: nn.Module, kv: KVQuantizer, rows: torch.Tensor) -> None:
        # A copy: rotary embeddings may be written over the keys that come before them.
        own = rows.detach().to(torch.float32, copy=True)
        keys = kv.key_layout.heads(own, key_heads(attention))
        taken[attention].append(keys.transpose(1, 2).flatten(0, 1))

    handles = []
    for attention in attentions:
        kv = attention.get_submodule(CHILD)
        assert isinstance(kv, KVQuantizer)
        hook = partial(take, attention, kv)
        handles.append(kv.key.register_forward_pre_hook(lambda _, args, hook=hook: hook(args[0])))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    found.update({attention: torch.cat(parts) for attention, parts in taken.items()})
