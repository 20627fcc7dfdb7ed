"""A model of packed layers as a directory, in the bytes that it has on the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtrain.files import atomic_directory, write_json
from qtrain.models.quantized.checkpoint import load_skeleton, read_quantized
from qtrain.models.quantized.layer import InputScheme
from qtrain.modules.config import QuantizerSection
from qtrain.modules.packed_identity import packed_identity, packed_layers, plain_name
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.quantizer import Quantizer

Progress = Callable[[Iterator[Any], int], Iterator[Any]]
METHOD = "qtrain"


def save_packed(model: PreTrainedModel, directory: Path) -> None:
    """Write ``directory``: config.json with the specs, safetensors with words, 16-bit scales and zero points.

    Layers as ``PackedLinear`` names their parts; everything else as transformers writes it, adapters left out.
    ``load_packed`` reads it, and as ``model.path`` it is a base like any other quantized checkpoint.
    """
    layers = packed_layers(model)
    plain = {
        plain_name(name): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name and not any(name.startswith(f"{layer}.") for layer in layers)
    }
    for name, layer in layers.items():
        plain |= {f"{name}.{part}": tensor for part, tensor in _parts(layer).items()}
    header = {"quant_method": METHOD, "identity": packed_identity(model), "layers": _specs(layers)}
    with atomic_directory(directory) as temporary:
        model.save_pretrained(temporary, state_dict=plain)
        path = temporary / "config.json"
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": header})


def load_packed(
    directory: Path,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    attention: str = "auto",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """The model of a quantized directory with its linear layers in packed integers, all of it frozen, in eval mode.

    Args:
        directory: of ``save_packed``, or one in GPTQ's, AWQ's, compressed-tensors' or HQQ's layout.
        dtype: of what is not quantized.

    Raises:
        ModelError: damaged, or codes that are no affine integers.
    """
    checkpoint = read_quantized(directory, whole_zero_points=False)  # the product is one of floats
    model = load_skeleton(checkpoint, dtype, device, attention=attention)
    layers = list(checkpoint.layers.items())
    for name, layer in progress(iter(layers), len(layers)) if progress else layers:
        bias = model.get_submodule(name).bias
        packed = PackedLinear.from_record(layer.load(), bias if isinstance(bias, Tensor) else None)
        if layer.inputs is not None:
            packed.input_quantizer = _input_quantizer(layer.inputs)
        model.set_submodule(name, packed.to(device))
    model.requires_grad_(False)
    model.eval()
    return model


def _parts(layer: PackedLinear) -> dict[str, Tensor]:
    parts = {
        "weight": layer.weight,
        "scale": layer.stored_scale(),
        "zero_point": layer.zero_point,
        "outlier_index": layer.outlier_index,
        "outlier_value": layer.outlier_value,
        "bias": layer.bias,
    }
    if layer.input_quantizer is not None and layer.input_quantizer.section.range != "dynamic":
        qparams = layer.input_quantizer.stored()
        parts |= {"input_scale": qparams.scale, "input_zero_point": qparams.zero_point}
    return {part: tensor.detach() for part, tensor in parts.items() if tensor is not None}


def _specs(layers: dict[str, PackedLinear]) -> list[dict[str, Any]]:
    """Layers that have one spec together."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        inputs = None if layer.input_quantizer is None else layer.input_quantizer.spec.to_dict()
        own = {"weight": layer.spec.to_dict(), "inputs": inputs}
        found.setdefault(json.dumps(own), {**own, "names": []})["names"].append(name)
    return list(found.values())


def _input_quantizer(scheme: InputScheme) -> Quantizer:
    spec = scheme.spec
    section = QuantizerSection(
        format=spec.format,
        symmetric=spec.symmetric,
        granularity=spec.granularity,
        group_size=spec.group_size,
        range="dynamic" if scheme.qparams is None else "static",
        full_range=spec.full_range,
        convention=spec.convention,
        scale_dtype=spec.scale_dtype,
    )
    quantizer = Quantizer(section)
    if scheme.qparams is not None:
        quantizer.set(scheme.qparams)
    return quantizer
