"""GPTQ directories: words along the input, zero points stored whole (v2) or less one (v1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.models.quantized.layer import QuantizedLayer, Reading, groups_of, linear_of, weight_spec, whole
from qtrain.models.quantized.tensors import FLOATS, TensorFiles
from qtrain.modules.record import LinearRecord
from qtrain.numerics.packing import unpack, unpack_rows, words_of
from qtrain.numerics.spec import QuantSpec

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A one in each field of a word."""


def read(tensors: TensorFiles, header: Mapping[str, Any], linears: Mapping[str, nn.Linear]) -> Reading:
    """Layers with ``qweight`` int32 [in b / 32, out], ``qzeros`` int32 [groups, out b / 32], ``scales`` [groups, out].

    w = (u - z) s with the scale of the column's group; ``g_idx`` int32 [in] says which, and must say k // group_size.

    Raises:
        ModelError: act-order, another layout, tensors that contradict the header.
    """
    layout = str(header.get("checkpoint_format") or header.get("format") or "gptq")
    if layout not in FORMATS or header.get("is_marlin_format"):
        raise ModelError(
            f"checkpoint_format={layout!r} of GPTQ",
            where=str(tensors.directory),
            rule="gptq and gptq_v2 are read; others are a kernel's own order of the same codes",
            fix="save it again with gptqmodel, format='gptq_v2'",
        )
    layers, taken = {}, set[str]()
    for name in (key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
        linear, options = linear_of(linears, name), options_of(header, name)
        bits = whole(options, ("bits",), BITS)
        size = whole(options, ("group_size",))
        group_size = None if size == -1 else size
        groups = groups_of(name, linear.in_features, group_size)
        k, n = linear.in_features, linear.out_features
        weight = f"a weight [{n}, {k}] in {bits} bits with group_size={size}"
        tensors.check(f"{name}.qweight", [words_of(k, bits), n], [torch.int32], weight)
        tensors.check(f"{name}.qzeros", [groups, words_of(n, bits)], [torch.int32], weight)
        tensors.check(f"{name}.scales", [groups, n], FLOATS, weight)
        _check_order(tensors, name, k, group_size or k, needed=bool(options.get("desc_act")))
        scale_dtype = tensors.dtype(f"{name}.scales")
        assert scale_dtype is not None  # checked
        spec = weight_spec(bits, group_size, symmetric=bool(options.get("sym", True)), scale_dtype=scale_dtype)
        layers[name] = QuantizedLayer(spec, partial(_record, tensors, name, spec, k, n, layout, header))
        taken |= {f"{name}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")} & set(tensors)
    return Reading(layers, frozenset(taken), f"GPTQ ({'v2' if layout == 'gptq_v2' else 'v1'})")


def options_of(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The header's options with what ``dynamic`` says of one layer: the first of its patterns that matches the name."""
    for pattern, overrides in (header.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            return {**header, **overrides}
    return {**header}


def _check_order(tensors: TensorFiles, name: str, columns: int, size: int, *, needed: bool) -> None:
    key = f"{name}.g_idx"
    if not needed and key not in tensors:  # early writers left it out where it says nothing
        return
    tensors.check(key, [columns], [torch.int32], f"an input of {columns}")
    order = tensors.get(key)
    if not torch.equal(order, torch.arange(columns, dtype=torch.int32) // size):
        wrong = int((order != torch.arange(columns, dtype=torch.int32) // size).nonzero()[0, 0])
        raise ModelError(
            f"act-order: column {wrong} belongs to group {int(order[wrong])}",
            where=f"{tensors.where(key)}: {key}",
            rule=f"groups are {size} neighbours, as every packed kernel has them: g_idx = k // {size}",
            fix="use a checkpoint made with desc_act=false (or act-order with static groups), "
            "or start from the 16-bit model with method.init=gptq",
        )


def _record(
    tensors: TensorFiles, name: str, spec: QuantSpec, columns: int, rows: int, layout: str, header: Mapping[str, Any]
) -> LinearRecord:
    codes = unpack_rows(tensors.get(f"{name}.qweight").t(), spec.bits, columns)
    scale = tensors.scale(f"{name}.scales").t().contiguous()
    key = f"{name}.qzeros"
    words, where = tensors.get(key), f"{tensors.where(key)}: {key}"
    if spec.symmetric:
        _check_symmetric(words, spec.bits, rows, where)
        return LinearRecord(codes, scale, None, spec)
    if layout == "gptq":
        words = _less_one_undone(words, spec.bits, rows, header, where)
    return LinearRecord(codes, scale, unpack(words, spec.bits, rows).t().contiguous(), spec)


def _check_symmetric(words: Tensor, bits: int, rows: int, where: str) -> None:
    """All zero points in the middle: 2^(b-1), or one less, whichever version the header names.

    GPTQModel 5 and later left v2's zero points under the name of v1 (vLLM #38966), and its 3-bit writer took the one
    from other bits than the lowest of each field; kernels for symmetric codes look at neither.
    """
    stored = unpack(words, bits, rows)
    if bool((stored == 0).all()) or bool((stored == -1).all()) or (bits == 3 and _of_old_writer(words)):
        return
    middle = 1 << (bits - 1)
    group, row = (int(index[0]) for index in ((stored != 0) & (stored != -1)).nonzero(as_tuple=True))
    raise ModelError(
        f"zero point {int(stored[group, row]) + middle} of row {row}, group {group}, in codes called symmetric",
        where=where,
        rule=f"sym=true: every stored zero point is {middle} (v2) or {middle - 1} (v1)",
        fix='"sym": false in quantization_config, if the codes are asymmetric',
    )


OLD_THREE_BIT_ONES = (0x24924924, 0x92492492, 0x49249249)
MIDDLE_THREE_BIT = (0x24924924, 0x49249249, 0x92492492)
"""Words 0, 1 and 2 of 32 fields that are 4."""


def _of_old_writer(words: Tensor) -> bool:
    expected = [(middle - ones) & 0xFFFFFFFF for middle, ones in zip(MIDDLE_THREE_BIT, OLD_THREE_BIT_ONES, strict=True)]
    pattern = torch.tensor(expected, dtype=torch.int64).repeat(-(-words.shape[1] // 3))[: words.shape[1]]
    return bool(((words.to(torch.int64) & 0xFFFFFFFF) == pattern).all())


def _less_one_undone(words: Tensor, bits: int, rows: int, header: Mapping[str, Any], where: str) -> Tensor:
    """The zero points of v1 as they were, packed.

    A zero point of 0 has nothing to take one from. GPTQModel since 0.9 subtracts from whole words, borrows and all, so
    adding to whole words gives back what was; AutoGPTQ's fields run into their neighbours, for good.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if bits == 3:
        raise ModelError(
            "asymmetric 3-bit codes with the zero points of v1",
            where=where,
            rule="its writers subtracted one from different bits: what was meant cannot be told",
            fix="save it again with gptqmodel, format='gptq_v2'",
        )
    if bool((unpack(words, bits, rows) == high).any()) and not _borrows(header):
        raise ModelError(
            f"stored zero points of {high - low}, which v1 has for 0",
            where=where,
            rule="only GPTQModel 0.9 and later (meta.quantizer) writes asymmetric zero points of v1 that can be undone",
            fix="use a checkpoint in gptq_v2, or one that GPTQModel wrote",
        )
    return words + torch.tensor(ONES[bits], dtype=torch.int32)


def _borrows(header: Mapping[str, Any]) -> bool:
    writers = (header.get("meta") or {}).get("quantizer") or []
    for writer in [writers] if isinstance(writers, str) else writers:
        found = re.fullmatch(r"gptqmodel:(\d+)\.(\d+).*", str(writer).lower())
        if found and (int(found[1]), int(found[2])) >= (0, 9):
            return True
    return False
