"""down(silu(g) * u) over packed integers: what down multiplies is made again for the backward, not kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.kernels.gated import gated, gated_backward
from qtrain.kernels.packed_linear import Packed, packed_weight, range_gradients, reads_outputs


def packed_gated_linear(
    gate: Tensor,
    up: Tensor,
    packed: Packed,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``packed_linear`` of h = silu(g) * u; gradients reach g, u, scale and a zero point that is a float.

    Saved for the backward: g and u, and the output where the scale's gradient is read off it.

    Args:
        gate, up: [.., in], in the dtype of the product. scale: [out, groups]. bias: [out].
    """
    with torch.autocast(gate.device.type, enabled=False):
        own_bias = None if bias is None else bias.to(gate.dtype)
        y: Tensor = _GatedProduct.apply(gate, up, scale, zero_point, packed, own_bias)  # type: ignore[no-untyped-call]
    return y


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        packed: Packed,
        bias: Tensor | None,
    ) -> Tensor:
        y = F.linear(gated(F.silu, gate, up), packed_weight(packed, scale, zero_point, gate.dtype), bias)
        _, _, trains_scale, trains_zero, *_ = ctx.needs_input_grad
        ctx.from_outputs = reads_outputs(packed, scale, trains_zero=trains_zero)
        kept = y if trains_scale and ctx.from_outputs else None
        ctx.save_for_backward(gate, up, kept, scale, zero_point, bias)
        ctx.packed, ctx.keeps_output = packed, kept is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, kept, scale, zero_point, bias = ctx.saved_tensors
        _, _, trains_scale, trains_zero, _, trains_bias = ctx.needs_input_grad
        dh = dy @ packed_weight(ctx.packed, scale, zero_point, dy.dtype)
        trains = trains_scale or trains_zero
        wanted = trains and not ctx.from_outputs
        h, d_gate, d_up = gated_backward(F.silu, gate, up, dh, opened=wanted, spent=True)
        del dh
        dscale = dzero = None
        if trains:
            seen = kept if ctx.from_outputs else h
            dscale, dzero = range_gradients(dy, seen, ctx.packed, scale, zero_point, bias, trains_zero=trains_zero)
        dbias = dy.flatten(0, -2).sum(0) if trains_bias else None
        return d_gate, d_up, dscale, dzero, None, dbias
