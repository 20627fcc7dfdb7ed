"""fp32 to bf16, up or down by chance, so that the mean of many roundings is the number itself."""

from __future__ import annotations

import torch
from torch import Tensor

FRACTION = 0xFFFF
"""Bits of an fp32 number that bf16 has no room for."""
LARGEST = 0x7F7F0000
"""Bits of bf16's largest number as fp32."""
SIGN = 0x7FFFFFFF
NAN = 0x7FC00000


def round_stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """x up with the probability of the part that is cut off: (bits(x) + noise) & 0xffff0000, in bf16.

    Numbers of bf16 stay, infinities and NaN stay, and no finite number becomes infinite: beyond bf16's largest number
    x becomes that number.

    Args:
        x: fp32.
        noise: int32 of x's shape, of which the lowest 16 bits count; uniform.
    """
    bits = x.view(torch.int32)
    added = (noise & FRACTION).mul_((bits & SIGN) < LARGEST)  # a carry would make infinity of the largest
    added.add_(bits).bitwise_and_(~FRACTION)
    added.masked_fill_(x.isnan(), NAN)  # cut off, a NaN's payload may leave an infinity
    return added.view(torch.float32).to(torch.bfloat16)


def counted_bits(keys: tuple[int, int], start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two words of 32 random bits for each of the numbers ``start`` .. ``start + count``: a hash of the number alone.

    No generator is advanced, so that any part of a tensor has its bits in any order, on any device.

    Args:
        keys: 32 bits each, of the stream.
    """
    first, second = (_signed(key) for key in keys)
    place = torch.arange(start, start + count, device=device).to(torch.int32)
    one = _mix_(_mix_(place.bitwise_xor_(first)).add_(second))
    return one, _mix_(one + first)


def _mix_(x: Tensor) -> Tensor:
    """A bijection, in place, in which each bit turns about half of the others (lowbias32, C. Wellons 2018)."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)  # int32 shifts its sign in
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _signed(word: int) -> int:
    """The int32 of these bits."""
    return word - 2**32 if word >= 2**31 else word
