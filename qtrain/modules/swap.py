"""One layer becomes its fake-quantized self, in place."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from qtrain.modules.config import QuantizerSection
from qtrain.modules.layer_options import Kind
from qtrain.modules.quant_activation import REPLACED, PactActivation
from qtrain.modules.quant_conv import QuantConv2d
from qtrain.modules.quant_embedding import QuantEmbedding
from qtrain.modules.quant_linear import QuantLinear

QUANTIZED = (QuantLinear, QuantConv2d, QuantEmbedding, PactActivation)
KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: "linear",
    QuantLinear: "linear",
    nn.Conv2d: "conv2d",
    QuantConv2d: "conv2d",
    nn.Embedding: "embedding",
    PactActivation: "pact",
    **dict.fromkeys(REPLACED, "pact"),
}


_WITH_QUANTIZED_ROWS: dict[type[nn.Module], type[nn.Module]] = {}


def kind_of(module: nn.Module) -> Kind | None:
    """What a layer is, None where it cannot be quantized.

    Of subclasses only embeddings count that go on with what ``nn.Embedding.forward`` looks up, as those do that scale
    it (Gemma, BART); a linear of another class multiplies in ways of its own (bitsandbytes, PEFT, attention's).
    """
    if isinstance(module, QuantEmbedding) or (isinstance(module, nn.Embedding) and _looks_up_as_usual(type(module))):
        return "embedding"
    return KINDS.get(type(module))


def quantize_layer(
    layer: nn.Module,
    weight: QuantizerSection | None,
    activation: QuantizerSection | None = None,
) -> None:
    """Turn a linear, a convolution or an embedding into a quantized one: the same object, of another class."""
    source = _with_own_weight(layer)
    quantized: nn.Module
    if isinstance(source, nn.Linear):
        quantized = QuantLinear.from_linear(source, weight, activation)
    elif isinstance(source, nn.Conv2d):
        quantized = QuantConv2d.from_conv(source, weight, activation)
    else:
        assert isinstance(source, nn.Embedding) and weight is not None
        quantized = QuantEmbedding.from_embedding(source, weight)
    for key, value in vars(quantized).items():
        vars(layer).setdefault(key, value)
    layer._modules.update(quantized._modules)
    for key, parameter in quantized._parameters.items():
        if key not in ("weight", "bias"):
            layer.register_parameter(key, parameter)
    layer.__class__ = type(quantized) if type(layer) in KINDS else _with_quantized_rows(type(layer))


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """What a quantized layer was."""
    if isinstance(layer, QuantEmbedding):
        return nn.Embedding if type(layer) is QuantEmbedding else type(layer).__bases__[0]
    return nn.Linear if isinstance(layer, QuantLinear) else nn.Conv2d


def _looks_up_as_usual(kind: type[nn.Embedding]) -> bool:
    if kind is nn.Embedding:
        return True
    code = getattr(kind.forward, "__code__", None)
    # `super().forward(...)`: the compiler notes the name and the class that `super` means.
    return code is not None and "forward" in code.co_names and "__class__" in code.co_freevars


def _with_quantized_rows(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` whose ``super().forward`` is QuantEmbedding's, the next in line."""
    if kind not in _WITH_QUANTIZED_ROWS:
        made = type(f"Quant{kind.__name__}", (kind, QuantEmbedding), {"__module__": kind.__module__})
        _WITH_QUANTIZED_ROWS[kind] = made
    return _WITH_QUANTIZED_ROWS[kind]


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
