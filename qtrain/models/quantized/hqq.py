"""HQQ directories as transformers saves them: codes of a group in a row, zero points of any value."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.models.quantized.layer import QuantizedLayer, Reading, groups_of, linear_of, signed, weight_spec
from qtrain.models.quantized.tensors import FLOATS, TensorFiles
from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import QuantSpec

PER_WORD = {"8bit_u8": 1, "4bit_u8": 2, "3bit_32": 10, "2bit_u8": 4}
FIELD = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2}
META = [
    "nbits",
    "group_size",
    "shape",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
]


def read(tensors: TensorFiles, header: Mapping[str, Any], linears: Mapping[str, nn.Linear]) -> Reading:
    """Layers with ``W_q``, ``scale`` and ``zero`` [out * groups, 1] and their own description in scalars beside them.

    w = (u - z) s with a zero point z of any value (Badri and Shaji 2023): records hold whole ones in int8 and others
    as z - 2^(b-1) in fp32, which is exact where z is stored in 16 bits and no closer to zero than 2^-9.

    Raises:
        ModelError: groups that run down the columns, quantized scales, tensors that contradict one another.
    """
    layers, taken = {}, set[str]()
    for name in (key.removesuffix(".W_q") for key in tensors if key.endswith(".W_q")):
        linear = linear_of(linears, name)
        k, n = linear.in_features, linear.out_features
        meta = _Meta(tensors, name)
        bits, size = meta.whole("nbits"), meta.whole("group_size")
        if tensors.get(f"{name}.shape").tolist() != [n, k]:
            raise meta.error(f"shape {tensors.get(f'{name}.shape').tolist()}", f"this layer is [{n}, {k}]")
        if bits not in range(2, 9):
            raise meta.error(f"nbits={bits}", "codes of 2 to 8 bits are read")
        if meta.whole("axis") != 1:
            raise meta.error(
                "axis=0: groups run down the columns", "packed kernels have groups along the input: axis=1"
            )
        if any(meta.whole(key) for key in ("quant_scale", "quant_zero")):
            raise meta.error("scales or zero points that are quantized themselves", "they are stored as floats")
        packing = meta.text("packing")
        if packing not in PER_WORD or FIELD[packing] < bits:
            raise meta.error(f"packing={packing!r} of {bits} bits", "there is: " + ", ".join(PER_WORD))
        rows = n * groups_of(name, k, size)
        weight = f"a weight [{n}, {k}] with group_size={size}"
        for part in ("scale", "zero"):
            tensors.check(f"{name}.{part}", [rows, 1], FLOATS, weight)
        if not meta.whole("view_as_float"):
            words = torch.int32 if packing == "3bit_32" else torch.uint8
            tensors.check(f"{name}.W_q", [-(-rows // PER_WORD[packing]), size], [words], f"{weight}, {packing},")
        scale_dtype = tensors.dtype(f"{name}.scale")
        assert scale_dtype is not None  # checked
        spec = weight_spec(bits, None if size == k else size, symmetric=False, scale_dtype=scale_dtype)
        whole = _is_whole(tensors.get(f"{name}.zero"), bits)
        load = partial(_record, tensors, name, spec, size, packing, n, k)
        layers[name] = QuantizedLayer(spec, load, whole_zero_points=whole)
        taken |= {f"{name}.{part}" for part in ("W_q", "scale", "zero", *META)} & set(tensors)
    return Reading(layers, frozenset(taken), "HQQ")


class _Meta:
    """A layer's description of itself: a scalar or a string of bytes each."""

    def __init__(self, tensors: TensorFiles, name: str) -> None:
        self.tensors, self.name = tensors, name

    def whole(self, key: str) -> int:
        value = self.tensors.get(f"{self.name}.{key}")
        if value.numel() != 1 or value.item() != int(value.item()):
            raise self.error(f"{key}={value.tolist()}", "it is a whole number")
        return int(value.item())

    def text(self, key: str) -> str:
        return bytes(self.tensors.get(f"{self.name}.{key}").to(torch.uint8).tolist()).decode("ascii", "replace")

    def error(self, what: str, rule: str) -> ModelError:
        return ModelError(
            what,
            where=f"{self.tensors.where(f'{self.name}.W_q')}: {self.name}",
            rule=rule,
            fix="start from the 16-bit model with method.init=hqq",
        )


def _record(
    tensors: TensorFiles, name: str, spec: QuantSpec, size: int, packing: str, rows: int, columns: int
) -> LinearRecord:
    words = tensors.get(f"{name}.W_q").contiguous()
    if words.dtype.is_floating_point:  # view_as_float: the bits of the words under another name
        words = words.view(torch.int32 if packing == "3bit_32" else torch.uint8)
    field, count = FIELD[packing], rows * columns // size
    # The first of a word's codes is in its highest field, and lies a whole block of rows before the second.
    shifts = [field * (PER_WORD[packing] - 1 - position) for position in range(PER_WORD[packing])]
    unsigned = torch.cat([(words >> shift) & ((1 << field) - 1) for shift in shifts])[:count]
    if list(unsigned.shape) != [count, size] or int(unsigned.max()) >= 1 << spec.bits:
        raise _Meta(tensors, name).error(
            f"codes {list(unsigned.shape)} up to {int(unsigned.max())}", f"{count} groups of {size} in {spec.bits} bits"
        )
    scale, zero = tensors.scale(f"{name}.scale"), tensors.scale(f"{name}.zero")
    middle = 1 << (spec.bits - 1)
    zero_point = zero.to(torch.float32) - middle
    if _is_whole(zero, spec.bits):
        zero_point = zero_point.to(torch.int8)
    codes = signed(unsigned, spec.bits).reshape(rows, columns)
    return LinearRecord(codes, scale.reshape(rows, -1), zero_point.reshape(rows, -1), spec)


def _is_whole(zero: Tensor, bits: int) -> bool:
    return bool(((zero == zero.round()) & (zero >= 0) & (zero < 1 << bits)).all())
