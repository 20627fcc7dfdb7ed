"""The canonical record of a quantized layer: every format is written from it, never from floats again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtrain.numerics.affine import QParams, dequantize
from qtrain.numerics.spec import QuantSpec


@dataclass(frozen=True)
class Outliers:
    """The few weights that stay in 16 bits beside the codes (SpQR, Dettmers 2023, arXiv 2306.03078).

    Attributes:
        index: int32 [n], positions in the flattened weight, rising.
        value: [n] in the spec's scale_dtype; takes the place of what the codes say.
    """

    index: Tensor
    value: Tensor


@dataclass(frozen=True)
class LinearRecord:
    """One linear layer in codes.

    Attributes:
        codes: int8 [out, in].
        scale: [out, groups] in the spec's scale_dtype.
        zero_point: int8 [out, groups], or fp32 where they are no whole numbers (HQQ's); None where the spec is
            symmetric.
        spec: what the codes mean.
        outliers: weights that the codes do not hold.
        inputs: the static range of the layer's input, scale [1, 1] and zero point, where it has one.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    outliers: Outliers | None = None
    inputs: QParams | None = None

    @property
    def qparams(self) -> QParams:
        """Scale and zero point together."""
        return QParams(self.scale, self.zero_point)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] that a consumer running in ``dtype`` computes with, bit for bit."""
        weight = dequantize(self.codes, self.qparams, self.spec, dtype)
        if self.outliers is not None:
            weight.view(-1)[self.outliers.index.long()] = self.outliers.value.to(dtype)
        return weight
