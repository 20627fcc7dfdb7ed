"""A quantized layer of a checkpoint: what it will be, known from headers, and its codes when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import QParams
from qtrain.numerics.spec import QuantSpec, ScaleDtype

SCALE_NAMES: dict[torch.dtype, ScaleDtype] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

FIX = "correct quantization_config in config.json, or start from the 16-bit model"


@dataclass(frozen=True)
class InputScheme:
    """What a checkpoint's consumer quantizes a layer's input to.

    Attributes:
        spec: of the codes.
        qparams: a static scale [1, 1] and zero point; None where they are taken from each input.
    """

    spec: QuantSpec
    qparams: QParams | None = None


@dataclass(frozen=True)
class QuantizedLayer:
    """One linear layer of a checkpoint.

    Attributes:
        spec: of its codes.
        load: reads them; nothing is held before the call or after it.
        inputs: None where the consumer leaves inputs in 16 bits.
        whole_zero_points: False where the record's zero points are fp32: HQQ's, which no integer kernel takes.
        outliers: how many weights lie beside the codes.
    """

    spec: QuantSpec
    load: Callable[[], LinearRecord]
    inputs: InputScheme | None = None
    whole_zero_points: bool = True
    outliers: int = 0


@dataclass(frozen=True)
class Reading:
    """What a format's reader found.

    Attributes:
        layers: by module name.
        tensors: names of all tensors that belong to them, biases left out.
        was: the format in words, for the terminal.
        notes: what is worth knowing of it.
    """

    layers: Mapping[str, QuantizedLayer]
    tensors: frozenset[str]
    was: str
    notes: tuple[str, ...] = field(default=())


def weight_spec(bits: int, group_size: int | None, *, symmetric: bool, scale_dtype: torch.dtype) -> QuantSpec:
    """The spec of codes that use all of their range, -2^(b-1) too."""
    return QuantSpec(
        format=f"int{bits}",
        symmetric=symmetric,
        granularity="per_group" if group_size else "per_channel",
        group_size=group_size,
        full_range=symmetric,
        scale_dtype=SCALE_NAMES[scale_dtype],
    )


def signed(unsigned: Tensor, bits: int) -> Tensor:
    """u in 0 .. 2^b - 1 as q = u - 2^(b-1), int8."""
    return (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def groups_of(name: str, columns: int, group_size: int | None) -> int:
    """Groups of a row.

    Raises:
        ModelError: the last group would be a short one.
    """
    if group_size is None:
        return 1
    if group_size < 1 or columns % group_size:
        raise ModelError(
            f"groups of {group_size} in rows of {columns}",
            where=name,
            rule="the group size divides the layer's input width",
            fix="quantize it with a group size that does, or start from the 16-bit model with method.init=gptq",
        )
    return columns // group_size


def linear_of(linears: Mapping[str, nn.Linear], name: str) -> nn.Linear:
    """The linear layer that a checkpoint's tensors belong to.

    Raises:
        ModelError: the model has none of that name.
    """
    if name not in linears:
        raise ModelError(
            f"{name} is quantized there, and is no linear layer of this model",
            rule="quantized tensors belong to nn.Linear layers by name; experts fused into one tensor are none",
            fix="start from the 16-bit model",
        )
    return linears[name]


def whole(header: Mapping[str, Any], keys: tuple[str, ...], allowed: Collection[int] | None = None) -> int:
    """A whole number of the header under the first of its spellings that is there.

    Raises:
        ModelError: there is none, or one that is not allowed.
    """
    value = next((header[key] for key in keys if header.get(key) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool) or (allowed is not None and value not in allowed):
        among = f"one of {', '.join(map(str, allowed))}" if allowed is not None else "a whole number"
        raise ModelError(f"{keys[0]}={value!r}", where="quantization_config", rule=f"{keys[0]} is {among}", fix=FIX)
    return value
