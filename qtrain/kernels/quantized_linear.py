"""y = fq(x) fq(W)^T + b as one autograd function that saves x and W alone: what a plain linear saves, and no more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.kernels.fake_quantize import backward, forward
from qtrain.numerics.rules import Rule


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    weight_rule: Rule | None,
    weight_scale: Tensor | None = None,
    weight_offset: Tensor | None = None,
    input_rule: Rule | None = None,
    input_scale: Tensor | None = None,
    input_offset: Tensor | None = None,
) -> Tensor:
    """Linear layer on the levels of its rules; the backward quantizes again rather than keep what it would need.

    Under autocast the input is cast before it is quantized and the product runs in autocast's dtype, as a consumer of
    that dtype computes it; the weight's levels are decided from its own dtype.

    Args:
        x: [.., in]. weight: [out, in]. bias: [out].
        weight_rule, input_rule: None leaves that side as it is.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    keys = (input_rule and input_rule.key, weight_rule and weight_rule.key)
    result: Tensor = _QuantizedLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, input_scale, input_offset, weight_scale, weight_offset, *keys
    )
    return result


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_offset: Tensor | None,
        weight_scale: Tensor | None,
        weight_offset: Tensor | None,
        input_key: str | None,
        weight_key: str | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, input_scale, input_offset, weight_scale, weight_offset)
        ctx.keys, ctx.bias_dtype = (input_key, weight_key), None if bias is None else bias.dtype
        quantized_x = _forward(x, input_scale, input_offset, input_key)
        quantized_w = _forward(weight, weight_scale, weight_offset, weight_key).to(x.dtype)
        return F.linear(quantized_x, quantized_w, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, input_scale, input_offset, weight_scale, weight_offset = ctx.saved_tensors
        input_key, weight_key = ctx.keys
        needs = ctx.needs_input_grad
        upper = gradients[0]
        rows = upper.reshape(-1, upper.shape[-1])
        found_x: tuple[Tensor | None, ...] = (None, None, None)
        found_w: tuple[Tensor | None, ...] = (None, None, None)
        if needs[0] or needs[3] or needs[4]:
            quantized_w = _forward(weight, weight_scale, weight_offset, weight_key).to(upper.dtype)
            d_x = (rows @ quantized_w).reshape(x.shape)
            del quantized_w
            found_x = _backward(x, input_scale, input_offset, d_x, input_key, (needs[0], needs[3], needs[4]))
        if needs[1] or needs[5] or needs[6]:
            quantized_x = _forward(x, input_scale, input_offset, input_key).reshape(-1, x.shape[-1])
            d_w = (rows.t() @ quantized_x.to(upper.dtype)).to(weight.dtype)
            del quantized_x
            found_w = _backward(weight, weight_scale, weight_offset, d_w, weight_key, (needs[1], needs[5], needs[6]))
        d_bias = rows.sum(0).to(ctx.bias_dtype) if needs[2] else None
        return found_x[0], found_w[0], d_bias, *found_x[1:], *found_w[1:], None, None


def _forward(x: Tensor, scale: Tensor | None, offset: Tensor | None, key: str | None) -> Tensor:
    return x if key is None else forward(x, scale, offset, key)


def _backward(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    gradient: Tensor,
    key: str | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (gradient, None, None) if key is None else backward(x, scale, offset, gradient, key, needs)
