"""Layers turn into fake-quantized ones in place: what QAT of any model begins with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.modules.config import QuantizerSection
from qtrain.modules.layer_options import Kind, Options, check_patterns, layer_options, matches
from qtrain.modules.quant_activation import REPLACED, PactActivation
from qtrain.modules.quant_conv import QuantConv2d
from qtrain.modules.quant_embedding import QuantEmbedding
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizer import Quantizer
from qtrain.modules.tied_weights import check_same, tied_groups, untie

KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: "linear",
    QuantLinear: "linear",
    nn.Conv2d: "conv2d",
    QuantConv2d: "conv2d",
    nn.Embedding: "embedding",
    QuantEmbedding: "embedding",
    PactActivation: "pact",
    **dict.fromkeys(REPLACED, "pact"),
}
QUANTIZED = (QuantLinear, QuantConv2d, QuantEmbedding, PactActivation)


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
    multiplied = [name for name, layer in layers.items() if KINDS[type(layer)] in ("linear", "conv2d")]
    heads = set() if head else _heads(model)
    for name, layer in layers.items():
        if layer in heads and not isinstance(layer, QUANTIZED):
            skipped[name] = "the output head: head=True quantizes it"
        elif pattern := matches(name, skip):
            skipped[name] = f"skip={pattern!r}"
    kinds = {name: KINDS[type(layer)] for name, layer in layers.items() if name not in skipped}
    options = layer_options(
        kinds,
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
    prepared = Prepared(found, skipped, notes + _notes(model, found, pact))
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
        place = (id(model.get_submodule(parent)), child) if KINDS.get(type(module)) == "pact" else id(module)
        if place in seen:
            continue
        seen.add(place)
        if name.startswith(tuple(adapted)):
            if type(module) in KINDS:
                skipped[name] = "inside an adapter's layer"
        elif type(module) in KINDS:
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
    source = _with_own_weight(layer)
    quantized: nn.Module
    if isinstance(source, nn.Linear):
        quantized = QuantLinear.from_linear(source, asked["weight"], asked["activation"])
    elif isinstance(source, nn.Conv2d):
        quantized = QuantConv2d.from_conv(source, asked["weight"], asked["activation"])
    else:
        assert isinstance(source, nn.Embedding) and asked["embedding"] is not None
        quantized = QuantEmbedding.from_embedding(source, asked["embedding"])
    for key, value in vars(quantized).items():
        vars(layer).setdefault(key, value)
    layer._modules.update(quantized._modules)
    for key, parameter in quantized._parameters.items():
        if key not in ("weight", "bias"):
            layer.register_parameter(key, parameter)
    layer.__class__ = type(quantized)


def _with_own_weight(layer: nn.Module) -> nn.Module:
    """The layer, or a stand-in where ``weight`` is no parameter: torch.nn.utils.prune makes it before each forward."""
    if "weight" in layer._parameters:
        return layer
    stand_in = copy.copy(layer)
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    vars(stand_in).pop("weight")
    stand_in._parameters = {
        "weight": nn.Parameter(weight.detach()),
        "bias": None if bias is None else nn.Parameter(bias.detach()),
    }
    return stand_in


def _notes(model: nn.Module, found: dict[Kind, list[str]], pact: QuantizerSection | None) -> list[str]:
    notes = []
    if pact is not None and not found["pact"]:
        notes.append("pact replaced nothing: there is no ReLU module, and F.relu inside a forward cannot be replaced")
    for name, module in model.named_modules():
        inside = any(isinstance(part, QUANTIZED) for part in module.modules())
        # In evaluation torch computes these from the weights in one fused call that knows no quantizers.
        if isinstance(module, nn.TransformerEncoderLayer) and inside and module.activation_relu_or_gelu:
            module.activation_relu_or_gelu = 0
            notes.append(f"{name}: torch's fused path of evaluation is off, which would use unquantized weights")
        if isinstance(module, nn.TransformerEncoder) and inside:
            module.use_nested_tensor = False
    return notes
