"""Scales after the codes: what the layer's outputs would have, given integers that are decided."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.numerics.affine import round_scale
from qtrain.numerics.spec import QuantSpec


def refit_scales(
    levels: Tensor, difference: Tensor, scale: Tensor, hessian: Tensor, spec: QuantSpec, sweeps: int = 2
) -> Tensor:
    """Scales [out, groups], as stored, that lessen d H d^T of each row; no row's error rises.

    Groups take turns: with n a group's levels, the others fixed, s -= (n (d H)_g^T) / (n H_gg n^T) is the
    least-squares scale, and what its storage rounds off is left to the groups after it. A step that would not lower
    the error as stored is not taken.

    Args:
        levels: n = q - z [out, in] (q + 1/2 where the spec is mid_rise), fp32.
        difference: d = n s - w [out, in], fp32.
        hessian: H = E[x x^T] [in, in].
    """
    h = hessian.to(levels)
    pull = difference @ h
    found = scale.to(torch.float32, copy=True)
    size = levels.shape[1] // scale.shape[1]
    for _ in range(sweeps):
        for group in range(scale.shape[1]):
            at = slice(group * size, (group + 1) * size)
            n = levels[:, at]
            curvature = ((n @ h[at, at]) * n).sum(dim=1)
            slope = (n * pull[:, at]).sum(dim=1)
            wanted = found[:, group] - slope / curvature.clamp(min=torch.finfo(torch.float32).tiny)
            step = round_scale(wanted, spec).to(torch.float32) - found[:, group]
            # d H d^T changes by 2 step slope + step^2 curvature.
            step = torch.where(step * (2 * slope + step * curvature) < 0, step, 0.0)
            found[:, group] += step
            pull.addmm_(n * step.unsqueeze(1), h[at])
    return found.to(scale.dtype)
