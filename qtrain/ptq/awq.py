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
SAMPLE = 256
"""Rows of each weight that exponents are compared on. On SmolLM2 (192 to 1,536 rows) the loss of the chosen one is
within 5 % of the best over all rows, in a third of the time."""


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
        size = (size / size.max().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=SMALLEST)
        scales: list[Tensor] = [size**exponent for exponent in torch.linspace(0, 1, self.options.grid).tolist()]
        scales = [scale / (scale.max() * scale.min()).sqrt() for scale in scales]
        sampled = [self.total(weights, inputs, scale[channel], SAMPLE) for scale in scales]
        still, best = scales[0], scales[sampled.index(min(sampled))]
        # What the sample says holds for all rows, or nothing moves.
        serves = self.total(weights, inputs, best[channel]) < self.total(weights, inputs, still[channel])
        return best if serves else still

    def total(
        self, weights: list[tuple[Tensor, QuantSpec]], inputs: Inputs, scale: Tensor, rows: int | None = None
    ) -> float:
        """The sum of the layers' losses; estimated from so many rows of each, or of all."""
        total = 0.0
        for weight, spec in weights:
            part = weight if rows is None else weight[:: max(1, len(weight) // rows)]
            total += self.loss(part, spec, inputs, scale) * len(weight) / len(part)
        return total

    def loss(self, weight: Tensor, spec: QuantSpec, inputs: Inputs, scale: Tensor) -> float:
        """tr(D H D^T), D = Q(W diag s) diag(1/s) - W; W diag s as the weight's dtype holds it."""
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
