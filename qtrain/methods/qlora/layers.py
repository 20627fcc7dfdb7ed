"""Which layers adapters can sit on."""

from __future__ import annotations

from collections.abc import Iterable

import bitsandbytes as bnb
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from qtrain.errors import ModelError
from qtrain.kernels.nf4_dequantize import begins_blocks_anew


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by name, those of quantization libraries too, without the adapters around them."""
    found = {
        name: module.get_base_layer() if isinstance(module, LoraLayer) else module
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and ".base_layer" not in name and ".lora_" not in name
    }
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def target_names(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """Full names of the linears to adapt.

    Args:
        wanted: ``all-linear`` (lm_head excluded), or names: each picks the linears that are so called or end with it.

    Raises:
        ModelError: a name that matches no linear; lists those there are.
    """
    head = model.get_output_embeddings()
    names = [name for name, module in linear_layers(model).items() if module is not head]
    if wanted == "all-linear":
        return names
    chosen: set[str] = set()
    for suffix in [wanted] if isinstance(wanted, str) else wanted:
        hits = [name for name in names if name == suffix or name.endswith("." + suffix)]
        if not hits:
            there = sorted({name.rpartition(".")[2] for name in names})
            raise ModelError(
                f"method.target_modules: {suffix!r} matches no linear layer",
                rule="a layer's name, or the end of it: q_proj, layers.3.mlp.up_proj",
                fix="there is: " + ", ".join(there),
            )
        chosen.update(hits)
    return [name for name in names if name in chosen]


def check_dora(model: nn.Module, names: Iterable[str]) -> None:
    """Raise where PEFT would take DoRA's norms of other numbers than the layer multiplies with.

    Raises:
        ModelError: rows of 4 bits on a CPU that end within a block.
    """
    for name in names:
        layer = model.get_submodule(name)
        weight = getattr(layer, "weight", None)
        state = getattr(weight, "quant_state", None)
        if isinstance(weight, bnb.nn.Params4bit) and state is not None and begins_blocks_anew(weight.data, state):
            raise ModelError(
                f"{name}: DoRA over {state.shape[-1]} inputs in {state.quant_type} on a CPU",
                rule=f"rows are multiples of {state.blocksize} there: PEFT has bitsandbytes read the others, as it did "
                "not store them",
                fix="a GPU; for a run that begins method.dora=false or method.base=int8 too",
            )
