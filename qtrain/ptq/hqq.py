"""Half-quadratic quantization: zero points and scales that leave a sparse error, from the weight alone.

min sum |w - (q - z) s|^p of each group is split in two (Badri and Shaji 2023, "Half-Quadratic Quantization of Large
Machine Learning Models"). With E the part of the error that is given up, in turns, beta growing,

    E = shrink(w - (q - z) s),  shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta)
    z = mean(q - (w - E) / s)

Errors are measured in units of s here, so that p and beta mean the same for every layer: in the units of the weights
everything below beta^(-1 / (2 - p)) = 0.17 shrinks to nothing, and a language model has no larger errors. The
source's z is a real number and its s never moves; a record holds integers: z is rounded, which takes back most moves
(0.12 of a code on average, SmolLM2 at 3 bits g64), and s solved by the same split,

    s = sum n (w - E) / sum n^2,  n = q - z

which is all there is to do where the spec is symmetric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import QParams, choose_qparams, grouped, level_codes, level_numbers, round_scale
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import HqqSection
from qtrain.ptq.rtn import nearest
from qtrain.ptq.start import Inputs, Start

CHUNK_ELEMENTS = 2**20
"""Weights worked on at a time, for bounded memory."""
BETA, GROWTH = 10.0, 1.01
"""The source's."""
SCALE_STEPS = 3
"""More of them lower the norm further, by clipping large weights that the layer needs: perplexity of SmolLM2-135M at 3
bits g64 from the extremes 191, after 3 steps 192, after 12 steps 399; the first 8 windows of 512."""
SETTLED = 0.01
"""Of a code: zero points that move less will hardly round to another integer."""


class Hqq(Start[HqqSection]):
    """z, then s, by half-quadratic splitting from each group's extremes; no group's p-norm rises above theirs."""

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        """The record of one weight [out, in]; a ModelError where it is not finite."""
        weight = weight.detach()
        return nearest(weight, half_quadratic_qparams(weight, spec, self.options.steps, self.options.p), spec)


def half_quadratic_qparams(weight: Tensor, spec: QuantSpec, steps: int = 20, p: float = 0.7) -> QParams:
    """Scale and zero point [out, groups], as stored, with a small sum |w - fq(w)|^p in each group.

    Args:
        weight: [out, in].
        steps: alternations of shrinkage and zero point, fewer where it settles.
        p: norm, in (0, 1].
    """
    found = [_solved(part, spec, steps, p) for part in weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1]))]
    zero_points = [one.zero_point for one in found if one.zero_point is not None]
    return QParams(torch.cat([one.scale for one in found]), torch.cat(zero_points) if zero_points else None)


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """sign(x) max(0, |x| - |x|^(p-1) / beta), which all but minimises |E|^p + beta / 2 (E - x)^2; for p = 1 it does."""
    size = x.abs()
    # Next to zero the power overflows; what it is subtracted from has vanished long before.
    return x.sign() * (size - size.clamp(min=1e-6).pow(p - 1.0) / beta).clamp_(min=0.0)


def _solved(weight: Tensor, spec: QuantSpec, steps: int, p: float) -> QParams:
    """Of some rows: the best of what was met on the way, as stored."""
    values = grouped(weight, spec)
    best = choose_qparams(weight, spec)
    least = _norm(values, best, spec, p)
    scale, zero_point = best
    if zero_point is not None:
        zero_point = _zero_point(values, best, spec, steps, p)
    beta = BETA
    for _ in range(SCALE_STEPS):
        u = values / scale.to(torch.float32).unsqueeze(-1)
        n = _levels(values, QParams(scale, zero_point), spec)
        kept = u - shrink(u - n, beta, p)
        moved = (n * kept).sum(dim=-1) / (n * n).sum(dim=-1).clamp(min=1e-30)
        scale = round_scale(moved * scale.to(torch.float32), spec)
        error = _norm(values, QParams(scale, zero_point), spec, p)
        better = error < least
        least = torch.where(better, error, least)
        if best.zero_point is not None and zero_point is not None:
            best = best._replace(zero_point=torch.where(better, zero_point, best.zero_point))
        best = best._replace(scale=torch.where(better, scale, best.scale))
        beta *= GROWTH
    return best


def _zero_point(values: Tensor, qparams: QParams, spec: QuantSpec, steps: int, p: float) -> Tensor:
    """z solved as a real number, the scale held; rounded to int8 at the end."""
    assert qparams.zero_point is not None
    u = values / qparams.scale.to(torch.float32).unsqueeze(-1)
    z = qparams.zero_point.to(torch.float32).unsqueeze(-1)
    settled, beta = torch.zeros_like(z, dtype=torch.bool), BETA
    for _ in range(steps):
        codes = (u + z).round_().clamp_(spec.quant_min, spec.quant_max)
        gap = codes - u
        wanted = (gap + shrink(z - gap, beta, p)).mean(dim=-1, keepdim=True)
        step = (wanted - z).masked_fill(settled, 0.0)
        z, settled = z + step, step.abs() < SETTLED
        if bool(settled.all()):
            break
        beta *= GROWTH
    return z.squeeze(-1).round_().clamp_(spec.quant_min, spec.quant_max).to(torch.int8)


def _levels(values: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """n = fq(w) / s."""
    ones = QParams(torch.ones_like(qparams.scale), qparams.zero_point)
    return level_numbers(level_codes(values, qparams, spec), ones, spec, torch.float32)


def _norm(values: Tensor, qparams: QParams, spec: QuantSpec, p: float) -> Tensor:
    """sum |w - fq(w)|^p [rows, groups]."""
    numbers = level_numbers(level_codes(values, qparams, spec), qparams, spec, torch.float32)
    return numbers.sub_(values).abs_().pow_(p).sum(dim=-1)
