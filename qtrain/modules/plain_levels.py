"""Which levels no one-pass kernel knows, so that PyTorch's operations find them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from qtrain.modules.kv.prepare import kv_quantizers
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizer import Quantizer

try:
    from qtrain.kernels import quantize_rows
except ImportError:  # Triton comes with torch where there is a GPU
    quantize_rows = None  # type: ignore[assignment]


def plain_levels(model: nn.Module, layers: Sequence[QuantLinear]) -> Counter[str] | None:
    """``{"14 weights of int4 per_block [64, 64]": ..}`` by their number, for a GPU; None where there is no Triton."""
    if quantize_rows is None:
        return None
    return Counter(
        kind for quantizer, shape, kind in _all(model, layers) if not quantize_rows.knows(quantizer.rule.key, shape)
    )


def _all(model: nn.Module, layers: Sequence[QuantLinear]) -> Iterator[tuple[Quantizer, tuple[int, ...], str]]:
    """(quantizer, a shape that it is given, its kind in words)."""
    for layer in layers:
        if (weights := layer.weight_quantizer) is not None:
            shape = tuple(layer.weight.shape)
            yield weights, shape, f"weights of {weights.spec.format} {weights.spec.granularity} {list(shape)}"
        if (inputs := layer.input_quantizer) is not None:
            yield inputs, (1, layer.in_features), f"inputs of {_words(inputs)}"
    for name, quantizer in kv_quantizers(model):
        # A row is of a head's numbers, or of all heads': what it divides into is seen to when the model is prepared.
        yield quantizer, (1, quantizer.spec.group_size or 1), f"{name.rpartition('.')[2]}s of {_words(quantizer)}"


def _words(quantizer: Quantizer) -> str:
    return f"{quantizer.spec.format} {quantizer.spec.granularity} {quantizer.section.range}"
