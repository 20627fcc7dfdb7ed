"""fp32 to bf16, up or down by chance, so that the mean of many roundings is the number itself."""

from __future__ import annotations

import torch
from torch import Tensor

FRACTION = 0xFFFF
"""Bits of an fp32 number that bf16 has no room for."""
LARGEST = 0x7F7F0000
"""Bits of bf16's largest number as fp32."""
SIGN = 0x7FFFFFFF
QUIET = 0x00400000


def round_stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """x up with the probability of the part that is cut off: (bits(x) + noise) & 0xffff0000, in bf16.

    Numbers of bf16 stay, infinities and NaN stay, and no finite number becomes infinite: beyond bf16's largest number
    x becomes that number.

    Args:
        x: fp32.
        noise: int32 of x's shape, of which the lowest 16 bits count; uniform.
    """
    bits = x.view(torch.int32)
    rounded = bits + (noise & FRACTION)
    rounded = torch.where((bits & SIGN) < LARGEST, rounded, bits)  # a carry would make infinity of the largest
    rounded = torch.where(x.isnan(), bits | QUIET, rounded)  # cut off, a NaN's payload may leave an infinity
    return (rounded & ~FRACTION).view(torch.float32).to(torch.bfloat16)


def counted_bits(keys: tuple[int, int], start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two words of 32 random bits for each of the numbers ``start`` .. ``start + count``: a hash of the number alone.

    No generator is advanced, so that any part of a tensor has its bits in any order, on any device.

    Args:
        keys: 32 bits each, of the stream.
    """
    first, second = (_signed(key) for key in keys)
    place = torch.arange(start, start + count, device=device).to(torch.int32)
    one = _mix(_mix(place ^ first) + second)
    return one, _mix(one + first)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits in which each bit turns about half of the others (lowbias32, C. Wellons 2018)."""
    x = x ^ ((x >> 16) & 0xFFFF)  # int32 shifts its sign in
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    """The int32 of these bits."""
    return word - 2**32 if word >= 2**31 else word
