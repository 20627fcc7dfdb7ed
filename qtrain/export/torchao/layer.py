"""One linear layer as torchao's tensor subclasses lie in safetensors: parts, and JSON that puts them together."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import QuantSpec

PARTS = ("qdata", "scale", "zero_point")


def tensors_of(name: str, record: LinearRecord, dtype: torch.dtype) -> dict[str, Tensor]:
    """``NAME._weight_qdata`` int8 [out, in], ``_weight_scale`` and ``_weight_zero_point`` [out, groups].

    Args:
        dtype: of the model; scales are stored in it where it holds them, else in fp32.
    """
    points = torch.zeros_like(record.scale, dtype=torch.int8) if record.zero_point is None else record.zero_point
    stored = torch.promote_types(record.scale.dtype, dtype)
    return {
        f"{name}._weight_qdata": record.codes,
        f"{name}._weight_scale": record.scale.to(stored),
        f"{name}._weight_zero_point": points,
    }


def description(spec: QuantSpec, activation: QuantSpec | None, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """The metadata of ``NAME.weight``: which subclass, and what it holds beside its tensors."""
    own = {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}
    block = [1, spec.group_size or shape[1]]
    content: dict[str, Any]
    if activation is not None and activation.symmetric:
        inputs = {"granularity": _row(), "mapping_type": _enum("MappingType", "SYMMETRIC"), "reduce_range": False}
        kind = "Int8Tensor"
        content = {
            "act_quant_kwargs": {"_type": "QuantizeTensorToInt8Kwargs", "_data": inputs},
            "reduce_range": False,
            "block_size": block,
            "dtype": own,
        }
    else:
        kind = "IntxUnpackedToInt8Tensor"
        content = {
            "target_dtype": {"_type": "torch.dtype", "_data": f"int{spec.bits}"},
            "block_size": block,
            "dtype": own,
            "activation_quantization": None if activation is None else "int8_asym_per_token",
        }
    return json.dumps({"_type": kind, "_data": content, "_tensor_data_names": list(PARTS)})


def quantization_config(spec: QuantSpec, activation: QuantSpec | None) -> dict[str, Any]:
    """``quantization_config`` of config.json: how torchao itself would make most of the layers."""
    group = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": spec.group_size}}
    granularity = group if spec.group_size else {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    mapping = _enum("MappingType", "SYMMETRIC" if spec.symmetric else "ASYMMETRIC")
    shared = {
        "intx_choose_qparams_algorithm": _enum("IntxChooseQParamsAlgorithm", "AFFINE"),
        "intx_packing_format": _enum("IntxPackingFormat", "UNPACKED_TO_INT8"),
        "weight_dtype": {"_type": "torch.dtype", "_data": f"int{spec.bits}"},
    }
    made: dict[str, Any]
    if activation is None:
        made = {
            "_type": "IntxWeightOnlyConfig",
            "_version": 2,
            "_data": {**shared, "granularity": granularity, "mapping_type": mapping, "scale_dtype": None},
        }
    elif activation.symmetric:
        inputs = {"act_mapping_type": _enum("MappingType", "SYMMETRIC"), "granularity": _row(), "reduce_range": False}
        made = {
            "_type": "Int8DynamicActivationInt8WeightConfig",
            "_version": 2,
            "_data": {**inputs, "set_inductor_config": True, "weight_only_decode": False},
        }
    else:
        made = {
            "_type": "Int8DynamicActivationIntxWeightConfig",
            "_version": 2,
            "_data": {
                **shared,
                "act_mapping_type": _enum("MappingType", "ASYMMETRIC"),
                "weight_granularity": granularity,
                "weight_mapping_type": mapping,
                "weight_scale_dtype": None,
            },
        }
    return {
        "quant_method": "torchao",
        "quant_type": {"default": made},
        "include_input_output_embeddings": False,
        "modules_to_not_convert": None,
        "untie_embedding_weights": False,
    }


def _enum(kind: str, value: str) -> dict[str, str]:
    return {"_type": kind, "_data": value}


def _row() -> dict[str, Any]:
    return {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
