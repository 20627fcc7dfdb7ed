"""SwiGLU's h = silu(g) u straight to the int8 codes of its rows: neither it nor its codes are kept for the backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.kernels.codes import codes, kernels_know, numbers
from qtrain.numerics.rules import RULES

try:
    from qtrain.kernels import gated_code_tiles
except ImportError:  # Triton comes with torch where there is a GPU
    gated_code_tiles = None  # type: ignore[assignment]


def gated_codes(gate: Tensor, up: Tensor, key: str) -> tuple[Tensor, Tensor]:
    """(q, s) of h as ``codes`` gives them; silu(g) and h are rounded to their dtype, as a consumer computes them.

    Args:
        gate, up: [rows, size].
        key: of a dynamic rule of symmetric integers with one scale a row, or of fp8, by ``codes``.
    """
    if _one_pass(gate, key):
        return gated_code_tiles.forward(RULES[key].spec, gate, up)
    return codes(F.silu(gate).mul_(up), key)


def gated_codes_backward(
    gate: Tensor, up: Tensor, gradient: Tensor, scales: Tensor, key: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(fq(h), dL/dg, dL/du) from dL/d fq(h), straight through; fq(h) may lie where the gradient lay.

    Args:
        scales: fp32 [rows], as ``gated_codes`` gave them.
    """
    if _one_pass(gate, key):
        return gated_code_tiles.backward(RULES[key].spec, gate, up, gradient, scales)
    opened = F.silu(gate)
    d_gate: Tensor = torch.ops.aten.silu_backward(gradient * up, gate)
    return numbers(*codes(opened * up, key), gate.dtype), d_gate, opened.mul_(gradient)


def _one_pass(gate: Tensor, key: str) -> bool:
    return gated_code_tiles is not None and kernels_know(RULES[key]) and gated_code_tiles.fits(gate)
