"""SpQR: the few weights that rounding would cost most stay in 16 bits, the rest goes by error feedback."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtrain.modules.record import LinearRecord, Outliers
from qtrain.numerics.affine import SCALE_DTYPES, QParams, choose_qparams, dequantize, grouped, quantize
from qtrain.numerics.ranges import search_qparams
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import SpqrSection
from qtrain.ptq.feedback import ErrorFeedback, hessian_of, row_errors
from qtrain.ptq.scale_refit import refit_scales
from qtrain.ptq.start import Inputs, Start, Statistic

ROUNDS = 2
"""Alternations of outliers and ranges; a third changes the error by less than 0.1 %."""


class Spqr(Start[SpqrSection]):
    """The share ``outliers`` of a layer's weights with the largest sensitivity (w - q)^2 / (2 [H^-1]_jj) keep 16 bits
    (Dettmers 2023, arXiv 2306.03078).

    Their place in the codes holds zero. The ranges are found as if they were not there; on the way through the columns
    they take up what others lost, and hand on no more than the rounding of their 16 bits.
    """

    statistic: ClassVar[Statistic] = "hessian"

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        """The record of one weight [out, in], with round(share * size) outliers, at least one.

        Raises:
            ModelError: no Hessian, one of another shape, or numbers that are not finite.
        """
        weight = weight.detach().to(torch.float32).contiguous()
        hessian = hessian_of(inputs, weight, "spqr")
        choose_qparams(weight, spec)  # an infinite weight would be taken for an outlier: it is an error
        feedback = ErrorFeedback.of(hessian, self.options.damping)
        kept, qparams = _outliers(weight, spec, feedback.saliency(), self.options.outliers)
        fed, rest = feedback.decide(weight, qparams, spec, kept)
        plain = quantize(weight.masked_fill(kept, 0.0), qparams, spec)
        stored = SCALE_DTYPES[spec.scale_dtype]

        def difference(codes: Tensor, values: Tensor) -> Tensor:
            numbers = dequantize(codes, qparams, spec)
            return torch.where(kept, values.to(stored).to(torch.float32), numbers) - weight

        better = row_errors(difference(fed, rest), hessian) < row_errors(difference(plain, weight), hessian)
        codes = torch.where(better.unsqueeze(1), fed, plain)
        values = torch.where(better.unsqueeze(1), rest, weight)
        levels = dequantize(codes, QParams(torch.ones_like(qparams.scale), qparams.zero_point), spec)
        scale = refit_scales(levels.masked_fill(kept, 0.0), difference(codes, values), qparams.scale, hessian, spec)
        index = kept.flatten().nonzero().squeeze(1)
        outliers = Outliers(index.to(torch.int32), values.flatten()[index].to(stored))
        return LinearRecord(codes, scale, qparams.zero_point, spec, outliers)


def _outliers(weight: Tensor, spec: QuantSpec, saliency: Tensor, share: float) -> tuple[Tensor, QParams]:
    """Which weights stay, bool [out, in], and the ranges of the others.

    Ranges and outliers in turns; the first ranges leave out each group's largest weight. Ranges that reach for a
    large weight leave it little error of its own, the cost falls on its neighbours: begun with them, the error was
    twice as large on heavy-tailed layers, 10 % larger on SmolLM2's at 4 bits.

    A weight that is left out counts as zero: zero widens no range and, being a level, has no error. Where the spec is
    mid_rise zero is half a step off its level, which draws scales down by the little that a share of 1 % weighs.
    """
    count = max(1, round(share * weight.numel()))
    groups = grouped(weight, spec).abs()
    kept = (groups == groups.amax(dim=-1, keepdim=True)).reshape(weight.shape)
    qparams = search_qparams(weight.masked_fill(kept, 0.0), spec, saliency)
    for _ in range(ROUNDS):
        error = dequantize(quantize(weight, qparams, spec), qparams, spec) - weight
        chosen = (error.square_() * saliency).flatten().topk(count, sorted=False).indices
        kept = torch.zeros_like(kept)
        kept.view(-1)[chosen] = True
        qparams = search_qparams(weight.masked_fill(kept, 0.0), spec, saliency)
    return kept, qparams
