"""Codes in 32-bit words, as compressed-tensors and its kernels (Marlin, Machete) lay them out."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.errors import ConfigError
from qtrain.numerics.row_parts import over_rows

PACKED_BITS = tuple(range(2, 9))
TOGETHER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integers of so many bytes."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 [out, in] to words int32 [out, ceil(in * bits / 32)].

    u = q + 2^(b-1) is unsigned; a row is one stream of bits, u_k in bits [k b, (k + 1) b), lowest first, the rest of
    the last word 0: 3, 5, 6 and 7 bits straddle words, as compressed-tensors and GPTQ have it for 3.
    Bytes are laid out as a little-endian machine (all that torch has wheels for) reads them into words.
    """
    _check(bits)
    columns = codes.shape[1]
    # The lowest b bits of q with the highest of them turned are those of u.
    unsigned = (codes.contiguous().view(torch.uint8) & ((1 << bits) - 1)).bitwise_xor_(1 << (bits - 1))
    if 8 % bits:
        packed = _pack_eights(unsigned, bits)
        packed = torch.nn.functional.pad(packed, (0, words_of(columns, bits) * 4 - packed.shape[1]))
    else:
        unsigned = torch.nn.functional.pad(unsigned, (0, -columns % (32 // bits)))
        packed = _fold(unsigned, bits)
    words: Tensor = packed.flatten().view(torch.int32).view(len(codes), words_of(columns, bits))
    return words


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Words int32 [out, words] to codes int8 [out, columns]: the inverse of ``pack``."""
    _check(bits)
    packed = words.contiguous().view(torch.uint8)
    unsigned = _unpack_eights(packed, bits) if 8 % bits else _unfold(packed, bits)
    half = -128 if bits == 8 else 1 << (bits - 1)  # int8 holds no 128, and wraps: less -128 is less 128
    return unsigned[:, :columns].contiguous().view(torch.int8) - half


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """``pack`` of a whole layer, some rows at a time on all cores; for what is never compiled."""
    words = torch.empty(len(codes), words_of(codes.shape[1], bits), dtype=torch.int32, device=codes.device)
    over_rows(lambda rows: words[rows].copy_(pack(codes[rows], bits)), codes)
    return words


def unpack_rows(words: Tensor, bits: int, columns: int) -> Tensor:
    """``unpack`` likewise."""
    codes = torch.empty(len(words), columns, dtype=torch.int8, device=words.device)
    over_rows(lambda rows: codes[rows].copy_(unpack(words[rows], bits, columns)), codes)
    return codes


def words_of(columns: int, bits: int) -> int:
    """Words that a row of ``columns`` codes takes."""
    return -(-columns * bits // 32)


def _fold(unsigned: Tensor, bits: int) -> Tensor:
    """Bytes of b bits each, 8 / b of them to one, by shifts of the number that they are together: a pass over words in
    place of passes over every second byte (1 ns a weight in place of 4).
    """
    per_byte = 8 // bits
    together = unsigned.flatten().view(TOGETHER[per_byte]).view(len(unsigned), unsigned.shape[1] // per_byte)
    folded = together
    for position in range(1, per_byte):
        folded = folded | (together >> (position * (8 - bits)))
    return folded.to(torch.uint8)  # its lowest byte


def _unfold(packed: Tensor, bits: int) -> Tensor:
    """The inverse of ``_fold``."""
    each = packed.to(TOGETHER[8 // bits])
    together = each
    for position in range(1, 8 // bits):
        together = together | (each << (position * (8 - bits)))
    apart = together.flatten().view(torch.uint8).view(len(packed), packed.shape[1] * (8 // bits))
    return apart & ((1 << bits) - 1)


def _pack_eights(unsigned: Tensor, bits: int) -> Tensor:
    """Eight codes of ``bits`` bits to ``bits`` bytes; what the padding of the last eight adds is cut off."""
    columns = unsigned.shape[1]
    eights = torch.nn.functional.pad(unsigned, (0, -columns % 8)).unflatten(1, (-1, 8)).to(torch.int64)
    stream = torch.zeros_like(eights[..., 0])
    for k in range(8):
        stream |= eights[..., k] << (k * bits)
    taken = stream.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(1)
    return taken[:, : words_of(columns, bits) * 4]


def _unpack_eights(packed: Tensor, bits: int) -> Tensor:
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    if bits == 3:  # 24 bits fit an int32: half the memory traffic of what the others take
        low, middle, high = packed.to(torch.int32).unbind(-1)
        stream = low | (middle << 8) | (high << 16)
    else:
        stream = torch.nn.functional.pad(packed, (0, 8 - bits)).view(torch.int64).squeeze(-1)
    parts = [((stream >> (k * bits)) & ((1 << bits) - 1)).to(torch.uint8) for k in range(8)]
    return torch.stack(parts, dim=-1).flatten(1)


def _check(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ConfigError(f"bits={bits}", rule=f"codes are packed in {', '.join(map(str, PACKED_BITS))} bits")
