"""AWQ directories in the layout of its GEMM kernel: eight outputs a word, interleaved."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.models.quantized.layer import QuantizedLayer, Reading, groups_of, linear_of, weight_spec, whole
from qtrain.models.quantized.tensors import FLOATS, TensorFiles
from qtrain.modules.record import LinearRecord
from qtrain.numerics.packing import unpack, words_of
from qtrain.numerics.spec import QuantSpec

NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble i of a word holds column [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight; this is the other way round."""


def read(tensors: TensorFiles, header: Mapping[str, Any], linears: Mapping[str, nn.Linear]) -> Reading:
    """Layers with ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8], ``scales`` [groups, out].

    w = (u - z) s, 4 bits, zero points stored as they are (Lin 2023, arXiv 2306.00978; AutoAWQ).

    Raises:
        ModelError: another layout, tensors that contradict the header.
    """
    layout = str(header.get("version") or header.get("format") or header.get("checkpoint_format") or "gemm").lower()
    if layout != "gemm":
        raise ModelError(
            f"version={layout!r} of AWQ",
            where=str(tensors.directory),
            rule="gemm is read; others are a kernel's own order of the same codes",
            fix="use the checkpoint's gemm version, or start from the 16-bit model with method.init=awq",
        )
    bits = whole(header, ("bits", "w_bit"), (4,))
    size = whole(header, ("group_size", "q_group_size"))
    group_size = None if size == -1 else size
    layers, taken = {}, set[str]()
    for name in (key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
        linear = linear_of(linears, name)
        groups = groups_of(name, linear.in_features, group_size)
        k, n = linear.in_features, linear.out_features
        weight = f"a weight [{n}, {k}] in {bits} bits with group_size={size}"
        tensors.check(f"{name}.qweight", [k, words_of(n, bits)], [torch.int32], weight)
        tensors.check(f"{name}.qzeros", [groups, words_of(n, bits)], [torch.int32], weight)
        tensors.check(f"{name}.scales", [groups, n], FLOATS, weight)
        scale_dtype = tensors.dtype(f"{name}.scales")
        assert scale_dtype is not None  # checked
        spec = weight_spec(bits, group_size, symmetric=False, scale_dtype=scale_dtype)
        layers[name] = QuantizedLayer(spec, partial(_record, tensors, name, spec))
        taken |= {f"{name}.{part}" for part in ("qweight", "qzeros", "scales")}
    return Reading(layers, frozenset(taken), "AWQ (gemm)")


def _record(tensors: TensorFiles, name: str, spec: QuantSpec) -> LinearRecord:
    codes, zero_point = (_columns(tensors.get(f"{name}.{part}")) for part in ("qweight", "qzeros"))
    return LinearRecord(codes, tensors.scale(f"{name}.scales").t().contiguous(), zero_point, spec)


def _columns(words: Tensor) -> Tensor:
    """Words int32 [rows, out / 8] as signed codes int8 [out, rows]."""
    nibbles = unpack(words, 4, words.shape[1] * 8).view(words.shape[0], -1, 8)
    return nibbles[..., list(NIBBLE_OF_COLUMN)].reshape(words.shape[0], -1).t().contiguous()
