"""Rounding with error feedback: what one column loses, the columns after it make up for (GPTQ)."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.errors import ModelError
from qtrain.numerics.affine import QParams, dequantize, quantize
from qtrain.numerics.spec import QuantSpec


def gptq_codes(
    weight: Tensor, qparams: QParams, hessian: Tensor, spec: QuantSpec, *, damping: float = 0.01, block: int = 32
) -> Tensor:
    """Codes int8 [out, in] that lessen tr((Q - W) H (Q - W)^T), given the scales (Frantar 2022, arXiv 2210.17323).

    Columns are decided one at a time, those with the largest H_jj first; with U the upper Cholesky factor of the
    damped H^-1, the error e = (w_j - q_j) / U_jj is spread over the columns not yet decided: w_k -= e U_jk. Scales
    stay where they are, so the order leaves no trace in the export. A row that plain rounding serves better keeps it.

    Args:
        weight: [out, in].
        hessian: H = E[x x^T] [in, in] of the layer's input.
        damping: added to H's diagonal, as a share of its mean.
        block: columns whose feedback onto all later ones is applied as one product; 32 keep what is done for each
            column below the size that torch spreads over threads, whose waiting costs more than they save.

    Raises:
        ModelError: H of another shape, or not finite.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns) or not bool(hessian.isfinite().all()):
        raise ModelError(
            f"hessian of shape {list(hessian.shape)} for a weight of shape {list(weight.shape)}",
            rule="it is finite, [in, in]",
        )
    order = torch.argsort(hessian.diagonal(), descending=True)
    factor = _inverse_factor(hessian.to(weight.device)[order][:, order], damping)
    target = weight.to(torch.float32)
    # Transposed, so that a column to decide is a contiguous row.
    rest = target.t()[order].contiguous()
    size = columns // qparams.scale.shape[1]
    scale = qparams.scale.to(torch.float32).t().repeat_interleave(size, dim=0)[order].contiguous()
    decided = torch.empty_like(rest, dtype=torch.int8)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = torch.empty_like(rest[first:last])
        for j in range(first, last):
            code = (rest[j] / scale[j]).round_().clamp_(spec.quant_min, spec.quant_max)
            decided[j] = code.to(torch.int8)
            errors[j - first] = (rest[j] - code * scale[j]) / factor[j, j]
            rest[j + 1 : last].addr_(factor[j, j + 1 : last], errors[j - first], alpha=-1)
        rest[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    codes = torch.empty_like(decided)
    codes[order] = decided
    fed, plain = codes.t().contiguous(), quantize(target, qparams, spec)
    better = output_error(target, fed, qparams, hessian, spec) < output_error(target, plain, qparams, hessian, spec)
    return torch.where(better.unsqueeze(1), fed, plain)


def output_error(weight: Tensor, codes: Tensor, qparams: QParams, hessian: Tensor, spec: QuantSpec) -> Tensor:
    """d H d^T [out] of each row's error d: the expected squared error of the layer's outputs."""
    difference = dequantize(codes, qparams, spec) - weight.to(torch.float32)
    return ((difference @ hessian.to(difference)) * difference).sum(dim=1)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U, upper, fp32, with U^T U = (H + damping * mean(diag H) I)^-1; computed in fp64.

    Where rounding left H + damping without a factor, the damping is raised tenfold until it has one.
    """
    exact = hessian.to(torch.float64)
    # Inputs that are all zero leave nothing to weigh: every column counts alike then.
    mean = float(exact.diagonal().mean()) or 1.0
    identity = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
    failed, share = 1, damping if bool(exact.diagonal().any()) else 1.0
    while failed:
        lower, info = torch.linalg.cholesky_ex(exact + share * mean * identity)
        failed, share = int(info), 10 * share
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).to(torch.float32)
    return factor
