"""GPTQ: codes by error feedback over correlated inputs, on scales that stay where they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import QParams, choose_qparams, dequantize, quantize
from qtrain.numerics.ranges import search_qparams
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import GptqSection
from qtrain.ptq.feedback import ErrorFeedback, Order, checked_hessian, hessian_of, row_errors
from qtrain.ptq.rtn import nearest
from qtrain.ptq.scale_refit import refit_scales
from qtrain.ptq.start import Inputs, Start, Statistic


class Gptq(Start[GptqSection]):
    """Scales by a search (or absmax), codes by feedback, then scales again for the codes (Frantar 2022, arXiv
    2210.17323).

    The search weighs each column's error with what it costs once the others have made up for it, 1 / [H^-1]_jj.
    Against H_jj that lowers the output error on held-out text by 1 to 17 % (SmolLM2-135M, 2 to 4 bits); the scales
    refitted to the codes lower it by 1 to 3 % more. No row errs more in the outputs than by rounding to the nearest,
    on these scales or on absmax.
    """

    statistic: ClassVar[Statistic] = "hessian"

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        """The record of one weight [out, in].

        Raises:
            ModelError: no Hessian, one of another shape, or numbers that are not finite.
        """
        options, weight = self.options, weight.detach()
        hessian = hessian_of(inputs, weight, "gptq")
        feedback = ErrorFeedback.of(hessian, options.damping, options.order)
        extremes = choose_qparams(weight, spec)
        if options.scales == "absmax":
            return LinearRecord(_fed_or_nearest(weight, extremes, hessian, spec, feedback), *extremes, spec)
        qparams = search_qparams(weight, spec, feedback.saliency())
        codes = _fed_or_nearest(weight, qparams, hessian, spec, feedback)
        levels = dequantize(codes, QParams(torch.ones_like(qparams.scale), qparams.zero_point), spec)
        difference = dequantize(codes, qparams, spec) - weight.to(torch.float32)
        scale = refit_scales(levels, difference, qparams.scale, hessian, spec)
        refitted = LinearRecord(codes, scale, qparams.zero_point, spec)
        return _better_rows(refitted, nearest(weight, extremes, spec), weight, hessian)


def gptq_codes(
    weight: Tensor,
    qparams: QParams,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    order: Order = "activation",
    block: int = 32,
) -> Tensor:
    """Codes int8 [out, in] that lessen tr((Q - W) H (Q - W)^T), given the scales (Frantar 2022, arXiv 2210.17323).

    Columns are decided one at a time; see ErrorFeedback. A row that plain rounding serves better keeps it.

    Args:
        weight: [out, in].
        hessian: H = E[x x^T] [in, in] of the layer's input.
        damping: added to H's diagonal, as a share of its mean.
        order: activation: columns with the largest H_jj first; given: by position.
        block: see ErrorFeedback.decide.

    Raises:
        ModelError: H of another shape, or not finite.
    """
    hessian = checked_hessian(hessian, weight)
    feedback = ErrorFeedback.of(hessian, damping, order)
    return _fed_or_nearest(weight, qparams, hessian, spec, feedback, block)


def output_error(weight: Tensor, codes: Tensor, qparams: QParams, hessian: Tensor, spec: QuantSpec) -> Tensor:
    """d H d^T [out] of each row's error d: the expected squared error of the layer's outputs."""
    return row_errors(dequantize(codes, qparams, spec) - weight.to(torch.float32), hessian)


def _fed_or_nearest(
    weight: Tensor, qparams: QParams, hessian: Tensor, spec: QuantSpec, feedback: ErrorFeedback, block: int = 32
) -> Tensor:
    """Codes by feedback, but for the rows that plain rounding serves better."""
    fed, _ = feedback.decide(weight, qparams, spec, block=block)
    plain = quantize(weight, qparams, spec)
    better = output_error(weight, fed, qparams, hessian, spec) < output_error(weight, plain, qparams, hessian, spec)
    return torch.where(better.unsqueeze(1), fed, plain)


def _better_rows(first: LinearRecord, second: LinearRecord, weight: Tensor, hessian: Tensor) -> LinearRecord:
    """Each row of whichever record errs less in the outputs."""
    better = row_errors(second.dequantize() - weight, hessian) < row_errors(first.dequantize() - weight, hessian)

    def chosen(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(better.unsqueeze(1), other, one)

    zero_point = first.zero_point
    if zero_point is not None and second.zero_point is not None:
        zero_point = chosen(zero_point, second.zero_point)
    return LinearRecord(chosen(first.codes, second.codes), chosen(first.scale, second.scale), zero_point, first.spec)
