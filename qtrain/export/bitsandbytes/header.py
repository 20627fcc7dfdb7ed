"""`quantization_config` of a bitsandbytes checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from qtrain.errors import ExportError
from qtrain.models.quantized.skeleton import empty_model
from qtrain.modules.frozen_linear import OUTLIER_THRESHOLD


@dataclass(frozen=True)
class Scheme:
    """What all layers of a checkpoint have in common.

    Attributes:
        kind: nf4, fp4 or int8.
        double_quant: block scales are in 8 bits.
        compute_dtype: of the product with the dequantized weight; LLM.int8() has its own.
        threshold: input columns with an entry above it run in 16 bits, of LLM.int8().
    """

    kind: str
    double_quant: bool = False
    compute_dtype: torch.dtype = torch.float32
    threshold: float = OUTLIER_THRESHOLD

    @classmethod
    def of(cls, layer: nn.Module) -> Scheme:
        """The scheme of one frozen layer."""
        if isinstance(layer, bnb.nn.Linear8bitLt):
            return cls("int8", threshold=float(layer.state.threshold))
        assert isinstance(layer, bnb.nn.Linear4bit) and isinstance(layer.weight, bnb.nn.Params4bit)
        state = layer.weight.quant_state
        assert state is not None
        return cls(state.quant_type, bool(state.nested), layer.compute_dtype or torch.float32)


def shared_scheme(layers: Iterable[tuple[str, nn.Module]]) -> Scheme:
    """The one scheme of all layers.

    Raises:
        ExportError: they have several.
    """
    found: dict[Scheme, str] = {}
    for name, layer in layers:
        found.setdefault(Scheme.of(layer), name)
    if len(found) > 1:
        (one, where), (other, elsewhere) = list(found.items())[:2]
        raise ExportError(
            f"{where} is {one.kind}, {elsewhere} is {other.kind}" if one.kind != other.kind else f"{one} and {other}",
            where=elsewhere,
            rule="a bitsandbytes checkpoint describes all its layers by one header",
            fix="export.format=adapter",
        )
    return next(iter(found))


def quantization_config(scheme: Scheme, config: PretrainedConfig, quantized: Collection[str]) -> dict[str, Any]:
    """The description that transformers reads.

    Args:
        quantized: names of the layers in codes; every other linear is named under ``llm_int8_skip_modules``, since a
            reader makes a layer of codes of each that is not.
    """
    model = empty_model(config, torch.float32)
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in quantized]
    if scheme.kind == "int8":
        header = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=scheme.threshold, llm_int8_skip_modules=kept)
    else:
        header = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=scheme.kind,
            bnb_4bit_use_double_quant=scheme.double_quant,
            bnb_4bit_compute_dtype=scheme.compute_dtype,
            bnb_4bit_quant_storage=torch.uint8,
            llm_int8_skip_modules=kept,
        )
    content: dict[str, Any] = header.to_dict()
    return content | {"quant_method": "bitsandbytes"}
