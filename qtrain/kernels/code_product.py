"""Products of codes with their scales, whatever the codes are: int8 or e4m3."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.kernels.fp8_product import Fp8Rows, fp8_matmul
from qtrain.kernels.int8_matmul import int8_matmul


def code_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y = (a b^T) a_scale b_scale^T + bias [m, n] in ``dtype``, rounded to it once.

    Of int8 a b^T is the exact integer. Of e4m3 it is a sum in fp32, in another order than the simulated product's: on
    fp8 units one of partial sums of at most 128 products in 14 bits or so, where bf16 keeps 8 of the result.

    Args:
        a: [m, k]. b: [n, k], both int8 or both float8_e4m3fn.
        a_scale: fp32 [m]. b_scale: fp32 [n]. bias: [n].
    """
    if not a.is_floating_point():
        return int8_matmul(a, b, a_scale, b_scale, bias, dtype)
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.qtrain.fp8_matmul(a, b, a_scale, b_scale, bias, dtype)
        return result
    return _fp8_matmul(a, b, a_scale, b_scale, bias, dtype)


def _fp8_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows, columns = Fp8Rows(a, a_scale.unsqueeze(1)), Fp8Rows(b, b_scale.unsqueeze(1))
    return fp8_matmul(rows, columns, dtype, bias, fast_sums=False)


@torch.library.custom_op("qtrain::fp8_matmul", mutates_args=())
def _fp8_matmul_op(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _fp8_matmul(a, b, a_scale, b_scale, bias, dtype)


@_fp8_matmul_op.register_fake
def _(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)
