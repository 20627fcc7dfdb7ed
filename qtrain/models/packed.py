"""A model of packed layers as a directory, in the bytes that it has on the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.files import atomic_directory, write_json
from qtrain.models.quantized.checkpoint import QuantizedCheckpoint, load_skeleton, read_quantized
from qtrain.models.quantized.layer import InputScheme, QuantizedLayer
from qtrain.models.quantized.skeleton import empty_model
from qtrain.models.stored import StoredWeights
from qtrain.modules.config import QuantizerSection
from qtrain.modules.packed_identity import packed_identity, packed_layers, plain_name
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.quantizer import Quantizer
from qtrain.modules.record import LinearRecord, Outliers
from qtrain.numerics.affine import SCALE_DTYPES

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
        model.set_submodule(name, packed_layer(layer, layer.load(), model.get_submodule(name)).to(device))
    model.requires_grad_(False)
    model.eval()
    return model


def packed_skeleton(
    directory: Path, dtype: torch.dtype, *, attention: str = "auto"
) -> tuple[PreTrainedModel, QuantizedCheckpoint, StoredWeights] | None:
    """The model of ``load_packed`` on the meta device, with what reads its layers and everything else one at a time;
    None where tensors are stored by other names than the model's.
    """
    checkpoint = read_quantized(directory, whole_zero_points=False)
    model = empty_model(checkpoint.config, dtype, attention)
    others = StoredWeights(directory, model, dtype, absent={f"{name}.weight" for name in checkpoint.layers})
    if not others.complete:
        return None
    for name, layer in checkpoint.layers.items():
        linear = model.get_submodule(name)
        model.set_submodule(name, packed_layer(layer, _shape_of(layer, linear), linear).to("meta"))
    model.requires_grad_(False)
    return model, checkpoint, others


def packed_layer(layer: QuantizedLayer, record: LinearRecord, linear: nn.Module) -> PackedLinear:
    """A layer of a checkpoint in the place of ``linear``, whose bias it takes."""
    bias = linear.bias
    packed = PackedLinear.from_record(record, bias if isinstance(bias, Tensor) else None)
    if layer.inputs is not None:
        packed.input_quantizer = input_quantizer(layer.inputs)
    return packed


def _shape_of(layer: QuantizedLayer, linear: nn.Module) -> LinearRecord:
    """The layer's record on the meta device."""
    spec, (out, columns) = layer.spec, (int(linear.out_features), int(linear.in_features))  # type: ignore[arg-type]
    groups, dtype = columns // (spec.group_size or columns), SCALE_DTYPES[spec.scale_dtype]
    with torch.device("meta"):
        points = torch.empty(out, groups, dtype=torch.int8 if layer.whole_zero_points else torch.float32)
        beside = Outliers(torch.empty(layer.outliers, dtype=torch.int32), torch.empty(layer.outliers, dtype=dtype))
        return LinearRecord(
            torch.empty(out, columns, dtype=torch.int8),
            torch.empty(out, groups, dtype=dtype),
            None if spec.symmetric else points,
            spec,
            beside if layer.outliers else None,
        )


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


def input_quantizer(scheme: InputScheme) -> Quantizer:
    """What quantizes a layer's input as its checkpoint has it."""
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
