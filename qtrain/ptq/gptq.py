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
    """Ranges by a search weighted with diag H (or absmax), codes by feedback, then the scales again (Frantar 2022,
    arXiv 2210.17323).

    No row's output error is above what rounding to the nearest leaves, neither on its own scales nor from absmax.
    """

    statistic: ClassVar[Statistic] = "hessian"

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        """The record of one weight [out, in].

        Raises:
            ModelError: no Hessian, one of another shape, or numbers that are not finite.
        """
        options, weight = self.options, weight.detach()
        hessian = hessian_of(inputs, weight, "gptq")
        extremes = choose_qparams(weight, spec)
        searched = options.scales == "mse"
        qparams = search_qparams(weight, spec, hessian.diagonal()) if searched else extremes
        codes = gptq_codes(weight, qparams, hessian, spec, damping=options.damping, order=options.order)
        if not searched:
            return LinearRecord(codes, *qparams, spec)
        levels = dequantize(codes, QParams(torch.ones_like(qparams.scale), qparams.zero_point), spec)
        difference = dequantize(codes, qparams, spec) - weight.to(torch.float32)
        scale = refit_scales(levels, difference, qparams.scale, hessian, spec)
        return _better_rows(
            LinearRecord(codes, scale, qparams.zero_point, spec), nearest(weight, extremes, spec), weight, hessian
        )


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
    fed, _ = ErrorFeedback.of(hessian, damping, order).decide(weight, qparams, spec, block=block)
    plain = quantize(weight, qparams, spec)
    better = output_error(weight, fed, qparams, hessian, spec) < output_error(weight, plain, qparams, hessian, spec)
    return torch.where(better.unsqueeze(1), fed, plain)


def output_error(weight: Tensor, codes: Tensor, qparams: QParams, hessian: Tensor, spec: QuantSpec) -> Tensor:
    """d H d^T [out] of each row's error d: the expected squared error of the layer's outputs."""
    return row_errors(dequantize(codes, qparams, spec) - weight.to(torch.float32), hessian)


def _better_rows(first: LinearRecord, second: LinearRecord, weight: Tensor, hessian: Tensor) -> LinearRecord:
    """Each row of whichever record errs less in the outputs."""
    better = row_errors(second.dequantize() - weight, hessian) < row_errors(first.dequantize() - weight, hessian)

    def chosen(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(better.unsqueeze(1), other, one)

    zero_point = first.zero_point
    if zero_point is not None and second.zero_point is not None:
        zero_point = chosen(zero_point, second.zero_point)
    return LinearRecord(chosen(first.codes, second.codes), chosen(first.scale, second.scale), zero_point, first.spec)
