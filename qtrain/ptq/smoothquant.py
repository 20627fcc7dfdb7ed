"""Outliers of a layer's input move into its weights, where 8 bits a row bear them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.balance import Balancing, largest_by_channel
from qtrain.ptq.config import SmoothQuantSection
from qtrain.ptq.rtn import nearest
from qtrain.ptq.start import Inputs, Start, Statistic


class SmoothQuant(Start[SmoothQuantSection], Balancing):
    """x / s and W s, s_j = max|x_j|^a / max|W_j|^(1-a), then round to nearest (Xiao 2022, arXiv 2211.10438).

    max|W_j| is over all layers that share the input, and over all query heads that share a channel of v.
    """

    looks_at: ClassVar[Statistic] = "moments"

    def scale(self, weights: list[tuple[Tensor, QuantSpec]], inputs: Inputs, channel: Tensor) -> Tensor:
        """s of each channel; 1 where the input or all its weights are zero."""
        assert inputs.largest is not None
        columns = torch.stack([weight.to(torch.float32).abs().amax(dim=0) for weight, _ in weights]).amax(dim=0)
        x, w = (largest_by_channel(values, channel) for values in (inputs.largest, columns))
        share = self.options.alpha
        return torch.where((x > 0) & (w > 0), x**share / w ** (1 - share), 1.0)

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        """The record of one weight [out, in]; a ModelError where it is not finite."""
        weight = weight.detach()
        return nearest(weight, choose_qparams(weight, spec), spec)
