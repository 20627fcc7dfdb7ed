"""Weights that several layers share: quantized once, or untied with a message."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from qtrain.errors import ModelError
from qtrain.modules.config import QuantizerSection


def tied_groups(layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of layers whose ``weight`` is one and the same parameter, in the order of the model."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is not None:
            groups[id(weight)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def check_same(sections: Mapping[str, QuantizerSection]) -> None:
    """Layers that share a weight share its codes.

    Raises:
        ModelError: their options differ.
    """
    names = list(sections)
    for name in names[1:]:
        if sections[name].model_dump() != sections[names[0]].model_dump():
            raise ModelError(
                f"{names[0]} and {name} share one weight and would have different codes of it",
                rule="what is tied is quantized once",
                fix="give both the same options, or leave one of them out, which unties them",
            )


def untie(model: nn.Module, layers: Mapping[str, nn.Module], quantized: list[str], plain: list[str]) -> str:
    """Give one side a weight of its own, so that the other keeps full precision; what was done, in words.

    A shared weight would be exported once, on the levels or not: one of the two would run with what it was not trained
    with.
    """
    order = list(layers)
    copied = max(quantized, plain, key=lambda side: min(map(order.index, side)))
    weight = layers[copied[0]].weight
    assert isinstance(weight, nn.Parameter)
    own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    for name in copied:
        layers[name].weight = own
    _forget_ties(model)
    return (
        f"untied: {', '.join(quantized)} quantized, {', '.join(plain)} as it was; "
        f"{', '.join(copied)} has a weight of its own now ({own.numel():,} parameters more)"
    )


def _forget_ties(model: nn.Module) -> None:
    """transformers would tie again at the next load or save: its config says so."""
    for module in model.modules():
        ties = getattr(module, "all_tied_weights_keys", None)
        if not isinstance(ties, dict):
            continue
        broken = [one for one, other in ties.items() if _weight(module, one) is not _weight(module, other)]
        for target in broken:
            del ties[target]
        if broken:
            module.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _weight(module: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return module.get_parameter(name)
    except AttributeError:  # a tie to a part that this model was built without
        return None
