"""fp8 weights as torchao's Float8Tensor, alone or beside inputs that it rounds to fp8 by token."""

from __future__ import annotations

from typing import Any

from qtrain.export.torchao.objects import enum, row, torch_dtype, versioned
from qtrain.numerics.affine import SMALLEST_FP32_SCALE
from qtrain.numerics.spec import FLOAT_MAX, QuantSpec

E4M3 = "float8_e4m3fn"
SMALLEST_REACH = FLOAT_MAX["fp8_e4m3"] * SMALLEST_FP32_SCALE
"""What max|x| of a token is raised to, as in training. Without it torchao (0.18) divides a token of zeros by 0, and a
padding token whose embedding is 0 turns to NaN.
"""


def content(spec: QuantSpec, activation: QuantSpec | None, shape: tuple[int, ...]) -> dict[str, Any]:
    """What a Float8Tensor holds beside ``qdata`` and ``scale``, its dtype left out."""
    inputs = {
        "float8_dtype": torch_dtype(E4M3),
        "granularity": row(),
        "mm_config": None,
        "hp_value_lb": SMALLEST_REACH,
        "hp_value_ub": None,
        "kernel_preference": enum("KernelPreference", "AUTO"),
    }
    return {
        "block_size": [1, shape[1]] if spec.granularity == "per_channel" else list(shape),
        "mm_config": None if activation is None else _product(),
        "act_quant_kwargs": None if activation is None else {"_type": "QuantizeTensorToFloat8Kwargs", "_data": inputs},
        "kernel_preference": enum("KernelPreference", "AUTO"),
    }


def config(spec: QuantSpec, activation: QuantSpec | None) -> dict[str, Any]:
    """How torchao itself would make such a layer."""
    granularity = row() if spec.granularity == "per_channel" else versioned("PerTensor")
    shared = {"set_inductor_config": True, "weight_dtype": torch_dtype(E4M3)}
    if activation is None:
        return versioned("Float8WeightOnlyConfig", 2, **shared, granularity=granularity)
    return versioned(
        "Float8DynamicActivationFloat8WeightConfig",
        2,
        **shared,
        activation_dtype=torch_dtype(E4M3),
        activation_value_lb=SMALLEST_REACH,
        activation_value_ub=None,
        granularity=[row(), granularity],
        kernel_preference=enum("KernelPreference", "AUTO"),
        mm_config=_product(),
    )


def _product() -> dict[str, Any]:
    """As qtrain.kernels.fp8_product has it, and torchao by itself."""
    return versioned("Float8MMConfig", emulate=False, pad_inner_dim=False, use_fast_accum=True)
