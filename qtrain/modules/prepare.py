"""Layers turn into fake-quantized ones in place: what QAT of any model begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qtrain.errors import ModelError
from qtrain.modules.config import QuantizerSection
from qtrain.modules.layer_options import Kind, Options, check_patterns, layer_options, matches
from qtrain.modules.quant_activation import REPLACED, PactActivation
from qtrain.modules.quant_conv import QuantConv2d
from qtrain.modules.quant_embedding import QuantEmbedding
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizer import Quantizer
from qtrain.modules.swap import QUANTIZED, kind_of, quantize_layer
from qtrain.modules.tied_weights import check_same, tied_groups, untie


@dataclass(frozen=True)
class Prepared:
    """What became of the layers of a model.

    Attributes:
        names: of the quantized layers by kind: linear, conv2d, embedding, pact.
        skipped: the other layers that hold a weight, and why each is as it was.
        notes: what else was done or could not be: weights untied, activations that are no modules.
    """

    names: dict[Kind, list[str]]
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Quantized layers."""
        return sum(map(len, self.names.values()))


def prepare_modules(
    model: nn.Module,
    *,
    weight: QuantizerSection | None = None,
    activation: QuantizerSection | None = None,
    pact: QuantizerSection | None = None,
    embedding: QuantizerSection | None = None,
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    skip: Sequence[str] = (),
    first_last: str | None = None,
    head: bool = False,
) -> Prepared:
    """Fake-quantize the linears, 2-d convolutions, embeddings and ReLUs of ``model``, in place.

    A layer stays the object that it was and changes its class: hooks, aliases, pruning masks and whatever else holds
    it stay valid. A ReLU is replaced, once for each name it has (a ReLU that one ``forward`` calls twice under one name
    keeps one bound for both). A layer that is quantized already is left alone, so a second call changes nothing.

    Args:
        weight, activation: of linears and convolutions; None leaves that side as it is.
        pact: of ReLU and ReLU6 modules.
        embedding: of embedding tables.
        rules: name pattern (as in a shell, over the whole name) to what differs there:
            ``{"*.down_proj": {"weight": {"format": "int8"}, "activation": None}}``; later patterns win. Keys are
            weight and activation, for embeddings embedding, for ReLUs pact.
        skip: name patterns of layers to leave alone.
        first_last: the first and the last linear or convolution, in the order of ``named_modules``, get this format
            (inputs too, where activations are quantized at all); one that is skipped stays in full precision.
        head: quantize the output head (``get_output_embeddings()``) as well.

    Raises:
        ModelError: a pattern that matches nothing, options that differ for tied weights, or nothing to quantize.
        ConfigError: a rule whose options do not exist.
    """
    rules = rules or {}
    layers, skipped = _layers(model)
    check_patterns(skip, [*layers, *skipped], "skip pattern")
    check_patterns(rules, [*layers, *skipped], "rule")
    kinds = {name: kind for name, layer in layers.items() if (kind := kind_of(layer))}
    multiplied = [name for name, kind in kinds.items() if kind in ("linear", "conv2d")]
    heads = set() if head else _heads(model)
    for name, layer in layers.items():
        if layer in heads and not isinstance(layer, QUANTIZED):
            skipped[name] = "the output head: head=True quantizes it"
        elif pattern := matches(name, skip):
            skipped[name] = f"skip={pattern!r}"
    options = layer_options(
        {name: kind for name, kind in kinds.items() if name not in skipped},
        {"weight": weight, "activation": activation, "pact": pact, "embedding": embedding},
        rules,
        dict.fromkeys(multiplied[:1] + multiplied[-1:], first_last) if first_last else {},
    )
    found: dict[Kind, list[str]] = {"linear": [], "conv2d": [], "embedding": [], "pact": []}
    shared, notes = _share_or_untie(model, layers, options)
    for name, asked in options.items():
        if isinstance(layers[name], QUANTIZED) or any(asked.values()):
            found[kinds[name]].append(name)
            if not isinstance(layers[name], QUANTIZED):
                _quantize(model, name, layers[name], asked)
        else:
            skipped[name] = f"no {' and no '.join(asked)} options"
    for names in shared:
        for name in names[1:]:
            layers[name].weight_quantizer = layers[names[0]].weight_quantizer
    prepared = Prepared(found, skipped, notes + _notes(model, found, pact, embedding))
    if not len(prepared):
        raise ModelError(
            f"{type(model).__name__} has no layer to quantize",
            rule="linears and 2-d convolutions can be, with embedding=... embeddings, with pact=... ReLU modules",
            fix="; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:6]) or None,
        )
    return prepared


def _layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """What can be quantized by name, in the order of the model; and what holds weights and cannot, with the reason."""
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    adapted = [f"{name}." for name, module in model.named_modules() if hasattr(module, "get_base_layer")]
    seen: set[object] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        parent, _, child = name.rpartition(".")
        kind = kind_of(module)
        place = (id(model.get_submodule(parent)), child) if kind == "pact" else id(module)
        if place in seen:
            continue
        seen.add(place)
        if name.startswith(tuple(adapted)):
            if kind is not None:
                skipped[name] = "inside an adapter's layer"
        elif kind is not None:
            layers[name] = module
        elif not isinstance(module, Quantizer) and any(own.ndim > 1 for own in module.parameters(recurse=False)):
            skipped[name] = f"a {type(module).__name__} is left alone"
    return layers, skipped


def _heads(model: nn.Module) -> set[nn.Module]:
    """Output heads of the transformers models inside."""
    heads = set()
    for module in model.modules():
        ask: Any = getattr(module, "get_output_embeddings", None)
        head = ask() if callable(ask) else None
        if isinstance(head, nn.Module):
            heads.add(head)
    return heads


def _share_or_untie(
    model: nn.Module, layers: dict[str, nn.Module], options: dict[str, Options]
) -> tuple[list[list[str]], list[str]]:
    """Layers that will share a quantizer, and in words what was untied."""
    shared, notes = [], []
    for names in tied_groups(layers):
        sections = {name: _weight_section(layers[name], options.get(name, {})) for name in names}
        quantized = {name: section for name, section in sections.items() if section is not None}
        plain = [name for name in names if name not in quantized]
        check_same(quantized)
        if quantized and plain:
            notes.append(untie(model, layers, list(quantized), plain))
        if quantized:
            shared.append(list(quantized))
    return shared, notes


def _weight_section(layer: nn.Module, asked: Options) -> QuantizerSection | None:
    if isinstance(layer, (QuantLinear, QuantConv2d, QuantEmbedding)):
        return None if layer.weight_quantizer is None else layer.weight_quantizer.section
    return asked.get("embedding" if isinstance(layer, nn.Embedding) else "weight")


def _quantize(model: nn.Module, name: str, layer: nn.Module, asked: Options) -> None:
    if isinstance(layer, REPLACED):
        assert asked["pact"] is not None
        activation = PactActivation(asked["pact"]).train(layer.training)
        device = next((parameter.device for parameter in model.parameters()), None)
        model.set_submodule(name, activation.to(device))
        return
    weight = asked["embedding"] if isinstance(layer, nn.Embedding) else asked["weight"]
    try:
        quantize_layer(layer, weight, asked.get("activation"))
    except ModelError as error:
        raise ModelError(error.what, where=error.where or name, rule=error.rule, fix=error.fix) from None


def _notes(
    model: nn.Module, found: dict[Kind, list[str]], pact: QuantizerSection | None, embedding: QuantizerSection | None
) -> list[str]:
    notes = []
    if pact is not None and not found["pact"]:
        notes.append("pact replaced nothing: there is no ReLU module, and F.relu inside a forward cannot be replaced")
    if embedding is not None and not found["embedding"]:
        notes.append("embedding quantized nothing: there is no table that is looked up as nn.Embedding does")
    for name, module in model.named_modules():
        inside = any(isinstance(part, QUANTIZED) for part in module.modules())
        # In evaluation torch computes these from the weights in one fused call that knows no quantizers.
        if isinstance(module, nn.TransformerEncoderLayer) and inside and module.activation_relu_or_gelu:
            module.activation_relu_or_gelu = 0
            notes.append(f"{name}: torch's fused path of evaluation is off, which would use unquantized weights")
        if isinstance(module, nn.TransformerEncoder) and inside:
            module.use_nested_tensor = False
    return notes
