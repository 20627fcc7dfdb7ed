"""Which layers of a model are given the same tensor: seen in a forward pass of a few tokens."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PROBE_TOKENS = 8


def inputs_of(
    model: PreTrainedModel, kind: type, context: Callable[[], AbstractContextManager[Any]]
) -> dict[int, list[Tensor]]:
    """What each layer of a kind, by its id, is given in a pass of a few tokens."""
    found: dict[int, list[Tensor]] = defaultdict(list)

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        found[id(module)].append(arguments[0])

    layers = [module for module in model.modules() if isinstance(module, kind)]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    ids = torch.arange(1, PROBE_TOKENS + 1, device=next(model.parameters()).device)[None]
    try:
        with torch.no_grad(), context():
            model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def by_parent(
    model: PreTrainedModel, kind: type, inputs: Mapping[int, list[Tensor]], refused: Counter[str]
) -> dict[nn.Module, list[dict[str, Tensor]]]:
    """The layers of each module in groups that are given the same tensor."""
    found: dict[nn.Module, list[dict[str, Tensor]]] = {}
    for parent in model.modules():
        groups: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, layer in parent.named_children():
            if isinstance(layer, kind):
                calls = inputs.get(id(layer), [])
                if len(calls) == 1:
                    groups[id(calls[0])][name] = calls[0]
                else:
                    refused["running several times a pass" if calls else "not running in a pass of a few tokens"] += 1
        if groups:
            found[parent] = list(groups.values())
    return found
