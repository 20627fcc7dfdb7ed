"""Frozen weights that are multiplied in fp8, whatever they are stored in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtrain.kernels.codes import turned
from qtrain.kernels.fp8_product import Fp8Rows, fp8_matmul, fp8_rows, fp8_rows_beside
from qtrain.kernels.lora_part import FrozenWeight, Made
from qtrain.modules.frozen_weight import Dequantized, Int8

WIDEST = 2**14
"""Outputs of weights over one input whose gradients are one product."""


class InFp8:
    """Another weight, rounded to e4m3 by row as it is dequantized; inputs and output gradients are rounded too.

    x W^T = s_x (q_x q_W^T) s_W^T, and dy W = s (q q_W) with s and q of dy s_W^T: the rows' scales of W are factors of
    what is summed over in the backward, so they go into dy before that is rounded, and the codes of W are the same.

    Args:
        frozen: whose weight it is.
    """

    def __init__(self, frozen: Dequantized) -> None:
        self._frozen = frozen
        self._scales: dict[torch.dtype, Tensor] = {}
        self._ones: Tensor | None = None
        self._beside: tuple[list[Tensor], Tensor] | None = None

    def product(self, x: Tensor, made: Made) -> Tensor:
        """x W^T + b; x is rounded once for all weights that are given it."""
        weight = self._weight(x.dtype, turn=False)
        if "fp8" not in made:
            made["fp8"] = fp8_rows(x)
        y, bias = fp8_matmul(made["fp8"], weight, x.dtype), self._frozen.bias(x.dtype)
        return y if bias is None else y.add_(bias)

    def input_gradient(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        """dy W, added to ``into``."""
        # Hopper's fp8 units want what is summed over side by side, in both.
        codes, scale = self._weight(dy.dtype, turn=True)
        found = self._times(fp8_rows(dy, scale.flatten()), codes, dy.dtype)
        return found if into is None else into.add_(found)

    def summed_gradient(self, others: Sequence[FrozenWeight], dys: Sequence[Tensor], width: int) -> Tensor | None:
        """The sum of dy W over this weight and others by one product; None where it is to be several.

        A row of [dy_1, dy_2, ..] has one scale. Of q, k and v of a 7B Llama it takes 0.54 ms in place of 0.63 (H200),
        of gate and up no less than two products, and twice the memory.

        Args:
            width: in.
        """
        every = [self, *(other for other in others if isinstance(other, InFp8))]
        sizes = [dy.shape[1] for dy in dys]
        if len(every) <= len(others) or sum(sizes) > WIDEST or any(size % 16 for size in sizes):
            return None
        dtype = dys[0].dtype
        codes = dys[0].new_empty(width, sum(sizes), dtype=torch.float8_e4m3fn)
        places = codes.split(sizes, 1)
        scales = [own._weight(dtype, turn=True, out=out).scale for own, out in zip(every, places, strict=True)]
        if self._beside is None or any(one is not other for one, other in zip(self._beside[0], scales, strict=True)):
            self._beside = scales, torch.cat(scales).flatten()
        return self._times(fp8_rows_beside(dys, self._beside[1]), codes, dtype)

    def _times(self, rows: Fp8Rows, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """By codes [in, ..] that have no scale."""
        if self._ones is None:
            self._ones = rows.scale.new_ones(len(codes), 1)
        return fp8_matmul(rows, Fp8Rows(codes, self._ones), dtype)

    def _weight(self, dtype: torch.dtype, *, turn: bool, out: Tensor | None = None) -> Fp8Rows:
        """Codes [out, in], or [in, out], and the scales of the rows of W, which are found once: W is frozen."""
        scale = self._scales.get(dtype)
        codes = None if scale is None else self._frozen.fp8_codes(scale, dtype, turn, out)
        if scale is None or codes is None:
            codes, scale = fp8_rows(self._frozen.weight(dtype))
            self._scales[dtype] = scale
            codes = turned(codes.view(torch.int8)).view(codes.dtype) if turn else codes
            codes = codes if out is None else out.copy_(codes)
        return Fp8Rows(codes, scale)


def in_fp8(frozen: FrozenWeight) -> FrozenWeight | str:
    """``frozen`` with products in fp8, or in words why not."""
    if isinstance(frozen, Int8) or not isinstance(frozen, Dequantized):
        return "LLM.int8(), which multiplies bytes"
    return InFp8(frozen)
