"""Codes in 32-bit words, as compressed-tensors and its kernels (Marlin, Machete) lay them out."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.errors import ConfigError

PACKED_BITS = (2, 4, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 [out, in] to words int32 [out, ceil(in * bits / 32)].

    u = q + 2^(b-1) is unsigned; the first code of a word takes its lowest bits; what is left of the last word is 0.
    Bytes are laid out as a little-endian machine (all that torch has wheels for) reads them into words.
    """
    _check(bits)
    rows, columns = codes.shape
    unsigned = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    unsigned = torch.nn.functional.pad(unsigned, (0, -columns % (32 // bits)))
    per_byte = 8 // bits
    packed = unsigned[:, ::per_byte].clone(memory_format=torch.contiguous_format)
    for position in range(1, per_byte):
        packed |= unsigned[:, position::per_byte] << (position * bits)
    words: Tensor = packed.view(torch.int32)
    return words


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Words int32 [out, words] to codes int8 [out, columns]: the inverse of ``pack``."""
    _check(bits)
    packed = words.contiguous().view(torch.uint8)
    parts = [(packed >> (position * bits)) & ((1 << bits) - 1) for position in range(8 // bits)]
    unsigned = torch.stack(parts, dim=-1).reshape(words.shape[0], -1)[:, :columns]
    return (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _check(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ConfigError(f"bits={bits}", rule=f"codes are packed in {', '.join(map(str, PACKED_BITS))} bits")
