"""Error feedback over correlated inputs: what one column loses, the columns decided after it make up for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qtrain.errors import ModelError
from qtrain.numerics.affine import SCALE_DTYPES, QParams, level_codes, level_numbers
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.start import Inputs

Order = Literal["activation", "given"]


@dataclass(frozen=True)
class ErrorFeedback:
    """One layer's order of columns, and where their errors go (GPTQ, Frantar 2022, arXiv 2210.17323).

    Attributes:
        order: [in], columns as they are decided.
        factor: U [in, in], upper, fp32, in that order: U^T U = (H + damping mean(diag H) I)^-1.
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, hessian: Tensor, damping: float = 0.01, order: Order = "activation") -> ErrorFeedback:
        """From H = E[x x^T] [in, in]; activation: the columns with the largest H_jj first."""
        diagonal = hessian.diagonal()
        columns = torch.argsort(diagonal, descending=True) if order == "activation" else torch.arange(len(diagonal))
        columns = columns.to(hessian.device)
        return cls(columns, _inverse_factor(hessian, columns, damping))

    def saliency(self) -> Tensor:
        """1 / [H^-1]_jj [in] of the damped H, by position: twice what a unit error in column j costs the output once
        all other columns have made up for it (optimal brain surgeon, Hassibi 1993; SpQR, arXiv 2306.03078, eq. 1).
        """
        found = torch.empty_like(self.factor[0])
        found[self.order] = self.factor.square().sum(dim=0).reciprocal()
        return found

    def decide(
        self, weight: Tensor, qparams: QParams, spec: QuantSpec, kept: Tensor | None = None, block: int = 32
    ) -> tuple[Tensor, Tensor]:
        """Codes int8 [out, in] of every column in turn, and what was rounded to them, fp32 [out, in].

        The error e = (w_j - q_j) / U_jj of a column is spread over those not yet decided: w_k -= e U_jk. Scales stay
        where they are, by position, so the order leaves no trace in the record.

        Args:
            kept: bool [out, in]; weights that take no code: they round to the spec's scale_dtype, which leaves next
                to no error to spread, and what they have taken up of others' errors stays. Their code is zero.
            block: columns whose feedback onto all later ones is applied as one product; 32 keep what is done for each
                column below the size that torch spreads over threads, whose waiting costs more than they save.
        """
        factor, columns = self.factor, self.order.tolist()
        # Transposed, so that a column to decide is a contiguous row.
        rest = weight.detach().to(torch.float32).t()[self.order].contiguous()
        stays = None if kept is None else kept.t()[self.order].contiguous()
        scale = qparams.scale.to(torch.float32).t().contiguous()
        zero = None if qparams.zero_point is None else qparams.zero_point.to(torch.float32).t().contiguous()
        size = len(columns) // len(scale)
        decided = torch.empty_like(rest, dtype=torch.int8)
        for first in range(0, len(columns), block):
            last = min(first + block, len(columns))
            errors = torch.empty_like(rest[first:last])
            for j in range(first, last):
                group = slice(columns[j] // size, columns[j] // size + 1)
                own = QParams(scale[group], None if zero is None else zero[group])
                value = rest[j] if stays is None else rest[j].masked_fill(stays[j], 0.0)
                codes = level_codes(value.view(1, -1, 1), own, spec)
                decided[j] = codes.view(-1)
                number = level_numbers(codes, own, spec, torch.float32).view(-1)
                if stays is not None:
                    number = torch.where(stays[j], rest[j].to(SCALE_DTYPES[spec.scale_dtype]).float(), number)
                errors[j - first] = (rest[j] - number) / factor[j, j]
                rest[j + 1 : last].addr_(factor[j, j + 1 : last], errors[j - first], alpha=-1)
            rest[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
        return self._by_position(decided), self._by_position(rest)

    def _by_position(self, rows: Tensor) -> Tensor:
        placed = torch.empty_like(rows)
        placed[self.order] = rows
        return placed.t().contiguous()


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """d H d^T [out] of each row d of a weight's error [out, in]: the expected squared error of the layer's outputs."""
    return ((difference @ hessian.to(difference)) * difference).sum(dim=1)


def hessian_of(inputs: Inputs, weight: Tensor, start: str) -> Tensor:
    """H [in, in] on the weight's device.

    Raises:
        ModelError: the inputs were not seen, or do not fit the weight.
    """
    if inputs.hessian is None:
        raise ModelError(
            f"{start} without the Hessian of the layer's input",
            rule="it is measured on calibration text: E[x x^T] [in, in]",
            fix="pass Inputs(hessian=...), or choose method.init=mse, rtn or hqq, which need no text",
        )
    return checked_hessian(inputs.hessian, weight)


def checked_hessian(hessian: Tensor, weight: Tensor) -> Tensor:
    """The same on the weight's device; a ModelError where its shape is another, or it is not finite."""
    columns = weight.shape[1]
    if hessian.shape != (columns, columns) or not bool(hessian.isfinite().all()):
        raise ModelError(
            f"hessian of shape {list(hessian.shape)} for a weight of shape {list(weight.shape)}",
            rule="it is finite, [in, in]",
            fix="observe the layer's own input, on rows without NaN or inf",
        )
    return hessian.to(weight.device)


def _inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """U, upper, fp32, with U^T U = (H + damping mean(diag H) I)^-1, columns in that order; computed in fp64.

    From the order turned round, H = L L^T: turned back, L is upper and H = L L^T still, so U = L^-1. Where rounding
    left H + damping without a factor, the damping is raised tenfold until it has one.
    """
    turned = order.flip(0)
    exact = hessian[turned][:, turned].to(torch.float64)
    given = exact.diagonal().clone()
    # Inputs that are all zero leave nothing to weigh: every column counts alike then.
    added = damping * float(given.mean()) or 1.0
    failed = 1
    while failed:
        exact.diagonal().copy_(given + added)
        lower, info = torch.linalg.cholesky_ex(exact)
        failed, added = int(info), 10 * added
    # Two matrices of fp64 at a time: 3.3 GB where a layer is 14336 wide.
    identity = exact.zero_()
    identity.fill_diagonal_(1.0)
    torch.linalg.solve_triangular(lower, identity, upper=False, out=identity)
    return identity.to(torch.float32).flip(0, 1)
