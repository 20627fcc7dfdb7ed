"""Products of bytes with their scales: on int8 tensor cores, on a CPU's int8 instructions, or in plain arithmetic."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

try:
    from qtrain.kernels import int8_bulk, int8_tiles
except ImportError:  # Triton comes with torch where there is a GPU
    int8_bulk = int8_tiles = None  # type: ignore[assignment]


def int8_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y = (a b^T) a_scale b_scale^T + bias [m, n] in ``dtype``; a b^T is the exact integer, the rest fp32.

    Args:
        a: int8 [m, k]. b: int8 [n, k]. k below 133,000, or int32 is left.
        a_scale: fp32 [m]. b_scale: fp32 [n], None for ones. bias: [n], None for zeros.
    """
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.qtrain.int8_matmul(a, b, a_scale, b_scale, bias, dtype)
        return result
    return _matmul(a, b, a_scale, b_scale, bias, dtype)


def int8_matmul_into(into: Tensor, a: Tensor, b: Tensor, a_scale: Tensor) -> Tensor:
    """``into`` [m, n], to which (a b^T) a_scale was added, rounded to its dtype before and after."""
    if not torch.compiler.is_compiling() and int8_bulk is not None and int8_bulk.takes(into, a, b):
        return int8_bulk.int8_matmul(a, b, a_scale, None, None, into.dtype, into)
    return into.add_(int8_matmul(a, b, a_scale, None, None, into.dtype))


def plain_int8_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same without a kernel of ours: torch's integer product, then the scales."""
    y = integer_product(a, b).to(torch.float32).mul_(a_scale.unsqueeze(1))
    if b_scale is not None:
        y.mul_(b_scale)
    if bias is not None:
        y.add_(bias)
    return y.to(dtype)


def tensor_core_words(device: torch.device) -> str:
    """What multiplies bytes on a GPU with Triton."""
    copied = int8_bulk is not None and device.type == "cuda" and int8_bulk.is_hopper(device.index or 0)
    return "int8 tensor cores" + (", large operands by Hopper's copy engine" if copied else "")


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of int8 [m, k] and [n, k] as integers, int32 or whole numbers in float64."""
    fits = int_mm_is_exact() if not a.is_cuda else a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0
    if fits:
        return torch._int_mm(a, b.t())
    return a.to(torch.float64) @ b.to(torch.float64).t()


@cache
def int_mm_is_exact() -> bool:
    """Whether this CPU sums products of bytes in 32 bits; without VNNI pairs may be added in 16, which saturate."""
    signs = torch.tensor([1, -1]).repeat(8).unsqueeze(1)
    codes = (127 * signs).expand(16, 64).to(torch.int8)
    return bool((torch._int_mm(codes, codes.t()) == 64 * 127 * 127 * signs @ signs.t()).all())


def _matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if int8_bulk is not None and int8_bulk.fits(a, b, dtype):
        return int8_bulk.int8_matmul(a, b, a_scale, b_scale, bias, dtype)
    if int8_tiles is not None and a.is_cuda and a.numel() and b.numel():
        return int8_tiles.int8_matmul(a, b, a_scale, b_scale, bias, dtype)
    return plain_int8_matmul(a, b, a_scale, b_scale, bias, dtype)


@torch.library.custom_op("qtrain::int8_matmul", mutates_args=())
def _matmul_op(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _matmul(a, b, a_scale, b_scale, bias, dtype)


@_matmul_op.register_fake
def _(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)
