"""Products of rows in fp8: on fp8 tensor cores, or of the same numbers in fp32 where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
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
    if fp8_tiles is not None and has_fp8(x.device) and x.numel():
        return Fp8Rows(*fp8_tiles.fp8_rows(x, factor))
    return plain_fp8_rows(x, factor)


def fp8_rows_beside(xs: Sequence[Tensor], factor: Tensor) -> Fp8Rows:
    """``fp8_rows`` of x_i [rows, n_i] side by side, by a factor [sum of n_i]; a row has one scale over all of them.

    e4m3 has its three bits of mantissa down to 2^-15 of the largest: x_i may be of very different sizes.
    """
    on_units = fp8_tiles is not None and has_fp8(xs[0].device) and all(x.numel() for x in xs)
    if on_units and len(xs) <= fp8_tiles.SOURCES:
        return Fp8Rows(*fp8_tiles.fp8_rows_beside(xs, factor))
    return fp8_rows(torch.cat(list(xs), 1), factor)


def plain_fp8_rows(x: Tensor, factor: Tensor | None = None) -> Fp8Rows:
    """The same in plain PyTorch."""
    numbers = x.to(torch.float32)
    if factor is not None:
        numbers = numbers * factor
    largest = torch.full((), LARGEST, device=x.device)  # a tensor: a GPU multiplies by 1 / n for a Python number n
    scale = (numbers.abs().amax(dim=1, keepdim=True) / largest).clamp(min=SMALLEST)
    inverse = torch.ones_like(scale) / scale  # of two tensors: a quotient, on a GPU too
    return Fp8Rows((numbers * inverse).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale)


def fp8_matmul(
    a: Fp8Rows, b: Fp8Rows, dtype: torch.dtype, bias: Tensor | None = None, *, fast_sums: bool = True
) -> Tensor:
    """y = s_a (q_a q_b^T) s_b^T + bias [m, n] in ``dtype``, rounded to it once.

    Args:
        a: of [m, k]. b: of [n, k]. On fp8 units k and n are multiples of 16 (``fp8_units_take``), else they are not
            used.
        bias: [n] in ``dtype``.
        fast_sums: keep sums in 14 bits or so, as Hopper's units do; else they go to fp32 each 128 products or less,
            which costs up to half the speed.
    """
    if a.codes.numel() and has_fp8(a.codes.device) and fp8_units_take(a.codes.shape[1], len(b.codes)):
        return _on_units(a, b, dtype, bias, fast_sums)
    return plain_fp8_matmul(a, b, dtype, bias)


def plain_fp8_matmul(a: Fp8Rows, b: Fp8Rows, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """The same product without fp8 units."""
    with torch.autocast(a.codes.device.type, enabled=False):  # it would round the sums to 16 bits before the scales
        total = a.codes.to(torch.float32) @ b.codes.to(torch.float32).t()
    return _scaled(total, a, b, dtype, bias)


def fp8_units_take(k: int, n: int) -> bool:
    """Whether fp8 units multiply [m, k] by [n, k]: both widths are multiples of 16."""
    return k % 16 == 0 and n % 16 == 0


def has_fp8(device: torch.device) -> bool:
    """Whether fp8 has units of its own there: compute capability 9.0. Below 8.9 Triton does not compile e4m3 at all."""
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and _capability(device.index) >= (9, 0)


@cache
def _capability(index: int | None) -> tuple[int, int]:
    """Asked for with every product, and torch takes several microseconds to tell."""
    return torch.cuda.get_device_capability(index)


def fp8_words(device: torch.device) -> str:
    """What computes such products there."""
    return "fp8 tensor cores" if has_fp8(device) else "the same numbers in fp32: no fp8 units here"


def _on_units(a: Fp8Rows, b: Fp8Rows, dtype: torch.dtype, bias: Tensor | None, fast_sums: bool) -> Tensor:
    if dtype == torch.bfloat16:
        product: Tensor = torch._scaled_mm(
            *(a.codes, b.codes.t(), a.scale, b.scale.t()), bias=bias, out_dtype=dtype, use_fast_accum=fast_sums
        )
        return product
    # Scales of rows come with sums in bf16 alone: another dtype takes fp32 ones, scaled afterwards.
    one = torch.ones((), device=a.codes.device)
    total = torch._scaled_mm(*(a.codes, b.codes.t(), one, one), out_dtype=torch.float32, use_fast_accum=fast_sums)
    return _scaled(total, a, b, dtype, bias)


def _scaled(total: Tensor, a: Fp8Rows, b: Fp8Rows, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    y = total.mul_(a.scale).mul_(b.scale.t())
    return (y if bias is None else y.add_(bias)).to(dtype)
