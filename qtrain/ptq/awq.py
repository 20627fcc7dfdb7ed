"""Input channels that carry large numbers get larger weights before rounding, and ranges are searched."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams
from qtrain.numerics.ranges import search_qparams
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.balance import Balancing, largest_by_channel
from qtrain.ptq.config import AwqSection
from qtrain.ptq.rtn import nearest
from qtrain.ptq.start import Inputs, Start, Statistic

SMALLEST = 1e-4
"""Of a channel's mean size, as a share of the largest: what is nearly silent is not shrunk to nothing."""


class Awq(Start[AwqSection], Balancing):
    """x / s and W s, s_j = (E|x_j|)^a / sqrt(max s min s), a searched (Lin 2023, arXiv 2306.00978).

    Of the grid's exponents, a = 0 among them, the one with the least sum of tr(D H D^T) over the layers that share the
    input, D = Q(W diag s) diag(1/s) - W, H = E[x x^T].
    """

    statistic: ClassVar[Statistic] = "hessian"
    looks_at: ClassVar[Statistic] = "hessian"

    def scale(self, weights: list[tuple[Tensor, QuantSpec]], inputs: Inputs, channel: Tensor) -> Tensor:
        """s of each channel; all 1 where nothing serves the layers better."""
        assert inputs.magnitude is not None
        size = largest_by_channel(inputs.magnitude, channel)
        size = size.clamp(min=max(SMALLEST * float(size.max()), torch.finfo(torch.float32).tiny))
        scales: list[Tensor] = []
        for exponent in torch.linspace(0, 1, self.options.grid).tolist():
            scale = size**exponent
            scales.append(scale / (scale.max() * scale.min()).sqrt())
        losses = [sum(self.loss(weight, spec, inputs, scale[channel]) for weight, spec in weights) for scale in scales]
        return scales[losses.index(min(losses))]

    def loss(self, weight: Tensor, spec: QuantSpec, inputs: Inputs, scale: Tensor) -> float:
        """tr(D H D^T), D = Q(W diag s) diag(1/s) - W, the balanced weight rounded to the weight's dtype."""
        assert inputs.hessian is not None and inputs.moment is not None
        exact = weight.to(torch.float32)
        seen = Inputs(moment=inputs.moment / scale.square(), hessian=inputs.hessian / torch.outer(scale, scale))
        record = self.quantize((exact * scale).to(weight.dtype), spec, seen)
        return float(row_errors(record.dequantize() / scale - exact, inputs.hessian).sum())

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        """Nearest levels of the searched ranges, but for rows that their extremes serve better (H has correlations)."""
        weight = weight.detach()
        plain = nearest(weight, choose_qparams(weight, spec), spec)
        if not self.options.clip:
            return plain
        searched = nearest(weight, search_qparams(weight, spec, inputs.moment), spec)
        if inputs.hessian is None:
            return searched
        exact = weight.to(torch.float32)
        errors = [row_errors(one.dequantize() - exact, inputs.hessian) for one in (searched, plain)]
        if len(plain.scale) != len(weight):  # rows share scales
            return searched if float(errors[0].sum()) < float(errors[1].sum()) else plain
        better = (errors[0] < errors[1]).unsqueeze(1)
        fields = [
            None if one is None or other is None else torch.where(better, one, other)
            for one, other in zip((searched.codes, *searched.qparams), (plain.codes, *plain.qparams), strict=True)
        ]
        assert fields[0] is not None and fields[1] is not None
        return LinearRecord(fields[0], fields[1], fields[2], spec)


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """d H d^T [out] of each row d."""
    return ((difference @ hessian) * difference).sum(dim=1)
