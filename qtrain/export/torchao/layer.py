"""One linear layer as torchao's tensor subclasses lie in safetensors: parts, and JSON that puts them together."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from qtrain.export.torchao import float8
from qtrain.export.torchao.objects import enum, row, torch_dtype, versioned
from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import QuantSpec

PARTS = ("qdata", "scale", "zero_point")


def tensors_of(name: str, record: LinearRecord, dtype: torch.dtype) -> dict[str, Tensor]:
    """``NAME._weight_qdata`` int8 [out, in], ``_weight_scale`` and ``_weight_zero_point`` [out, groups]; of fp8
    ``_weight_qdata`` float8_e4m3fn and ``_weight_scale`` fp32 [out, 1] or [1, 1].

    Args:
        dtype: of the model; scales of integers are stored in it where it holds them, else in fp32.
    """
    if record.spec.is_float:  # torch's product of fp8 rows takes no other scales
        return {f"{name}._weight_qdata": record.codes, f"{name}._weight_scale": record.scale.to(torch.float32)}
    points = torch.zeros_like(record.scale, dtype=torch.int8) if record.zero_point is None else record.zero_point
    stored = torch.promote_types(record.scale.dtype, dtype)
    return {
        f"{name}._weight_qdata": record.codes,
        f"{name}._weight_scale": record.scale.to(stored),
        f"{name}._weight_zero_point": points,
    }


def description(spec: QuantSpec, activation: QuantSpec | None, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """The metadata of ``NAME.weight``: which subclass, and what it holds beside its tensors."""
    block = [1, spec.group_size or shape[1]]
    parts = list(PARTS)
    content: dict[str, Any]
    if spec.is_float:
        kind, parts = "Float8Tensor", parts[:2]
        content = float8.content(spec, activation, shape)
    elif activation is not None and activation.symmetric:
        inputs = {"granularity": row(), "mapping_type": enum("MappingType", "SYMMETRIC"), "reduce_range": False}
        kind = "Int8Tensor"
        content = {
            "act_quant_kwargs": {"_type": "QuantizeTensorToInt8Kwargs", "_data": inputs},
            "reduce_range": False,
            "block_size": block,
        }
    else:
        kind = "IntxUnpackedToInt8Tensor"
        content = {
            "target_dtype": torch_dtype(f"int{spec.bits}"),
            "block_size": block,
            "activation_quantization": None if activation is None else "int8_asym_per_token",
        }
    content["dtype"] = torch_dtype(str(dtype).removeprefix("torch."))
    return json.dumps({"_type": kind, "_data": content, "_tensor_data_names": parts})


def quantization_config(spec: QuantSpec, activation: QuantSpec | None) -> dict[str, Any]:
    """``quantization_config`` of config.json: how torchao itself would make most of the layers."""
    made = float8.config(spec, activation) if spec.is_float else _integer_config(spec, activation)
    return {
        "quant_method": "torchao",
        "quant_type": {"default": made},
        "include_input_output_embeddings": False,
        "modules_to_not_convert": None,
        "untie_embedding_weights": False,
    }


def _integer_config(spec: QuantSpec, activation: QuantSpec | None) -> dict[str, Any]:
    groups = spec.group_size
    granularity = versioned("PerGroup", group_size=groups) if groups else versioned("PerAxis", axis=0)
    mapping = enum("MappingType", "SYMMETRIC" if spec.symmetric else "ASYMMETRIC")
    shared = {
        "intx_choose_qparams_algorithm": enum("IntxChooseQParamsAlgorithm", "AFFINE"),
        "intx_packing_format": enum("IntxPackingFormat", "UNPACKED_TO_INT8"),
        "weight_dtype": torch_dtype(f"int{spec.bits}"),
    }
    if activation is None:
        return versioned(
            "IntxWeightOnlyConfig", 2, **shared, granularity=granularity, mapping_type=mapping, scale_dtype=None
        )
    if activation.symmetric:
        return versioned(
            "Int8DynamicActivationInt8WeightConfig",
            2,
            act_mapping_type=enum("MappingType", "SYMMETRIC"),
            granularity=row(),
            reduce_range=False,
            set_inductor_config=True,
            weight_only_decode=False,
        )
    return versioned(
        "Int8DynamicActivationIntxWeightConfig",
        2,
        **shared,
        act_mapping_type=enum("MappingType", "ASYMMETRIC"),
        weight_granularity=granularity,
        weight_mapping_type=mapping,
        weight_scale_dtype=None,
    )
