"""Products of rows in fp8: on fp8 tensor cores, or of the same numbers in fp32 where there are none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

try:
    from qtrain.kernels import fp8_tiles
except ImportError:  # Triton comes with torch where there is a GPU
    fp8_tiles = None  # type: ignore[assignment]

LARGEST = 448.0
"""Of e4m3."""
SMALLEST = 2.0**-100
"""A scale is no smaller: rows of zeros stay zeros."""


class Fp8Rows(NamedTuple):
    """A matrix, each row with a scale.

    Attributes:
        codes: float8_e4m3fn [rows, n].
        scale: fp32 [rows, 1].
    """

    codes: Tensor
    scale: Tensor


def fp8_rows(x: Tensor, factor: Tensor | None = None) -> Fp8Rows:
    """q = e4m3(x (1 / s)), s = max|x| / 448 of each row of x [rows, n], or of x * factor [n]."""
    if fp8_tiles is not None and x.is_cuda and x.numel():
        return Fp8Rows(*fp8_tiles.fp8_rows(x, factor))
    return plain_fp8_rows(x, factor)


def plain_fp8_rows(x: Tensor, factor: Tensor | None = None) -> Fp8Rows:
    """The same in plain PyTorch."""
    numbers = x.to(torch.float32)
    if factor is not None:
        numbers = numbers * factor
    largest = torch.full((), LARGEST, device=x.device)  # a tensor: a GPU multiplies by 1 / n for a Python number n
    scale = (numbers.abs().amax(dim=1, keepdim=True) / largest).clamp(min=SMALLEST)
    inverse = torch.ones_like(scale) / scale  # of two tensors: a quotient, on a GPU too
    return Fp8Rows((numbers * inverse).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale)


def fp8_matmul(a: Fp8Rows, b: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """y = s_a (q_a q_b^T) s_b^T [m, n] in ``dtype``.

    Args:
        a: of [m, k]. b: of [n, k]. On fp8 units k and n are multiples of 16, else they are not used.
    """
    if a.codes.is_cuda and has_fp8(a.codes.device) and not a.codes.shape[1] % 16 and not len(b.codes) % 16:
        # Sums of 32 products are kept in 14 bits or so unless use_fast_accum is off, which halves the speed.
        product: Tensor = torch._scaled_mm(
            a.codes, b.codes.t(), a.scale, b.scale.t(), out_dtype=dtype, use_fast_accum=True
        )
        return product
    return plain_fp8_matmul(a, b, dtype)


def plain_fp8_matmul(a: Fp8Rows, b: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """The same product without fp8 units."""
    total = a.codes.to(torch.float32) @ b.codes.to(torch.float32).t()
    return total.mul_(a.scale).mul_(b.scale.t()).to(dtype)


def has_fp8(device: torch.device) -> bool:
    """Whether products of rows in fp8 run on units of their own: compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
