"""y = fq(x) fq(W)^T + b as one autograd function that saves x and W alone: what a plain linear saves, and no more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.kernels.fake_quantize import backward, forward
from qtrain.kernels.shared_input import Latest, cast_for_product, forget_casts
from qtrain.numerics.rules import Rule

Options = tuple[str | None, str | None, bool]
"""Keys of the input's and the weight's rule, and whether to quantize in PyTorch's operations."""


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
    plain: bool = False,
) -> Tensor:
    """Linear layer on the levels of its rules; the backward quantizes again rather than keep what it would need.

    Under autocast the input is cast before it is quantized and the product runs in autocast's dtype, as a consumer of
    that dtype computes it; the weight's levels are decided from its own dtype.

    Args:
        x: [.., in]. weight: [out, in]. bias: [out].
        weight_rule, input_rule: None leaves that side as it is.
        plain: quantize in PyTorch's operations even where there is a kernel.
    """
    # One argument: autograd looks into each of them.
    options = input_rule and input_rule.key, weight_rule and weight_rule.key, plain
    result: Tensor = _QuantizedLinear.apply(  # type: ignore[no-untyped-call]
        cast_for_product(x), weight, bias, input_scale, input_offset, weight_scale, weight_offset, options
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
        options: Options,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, input_scale, input_offset, weight_scale, weight_offset)
        ctx.options, ctx.bias_dtype = options, None if bias is None else bias.dtype
        input_key, weight_key, plain = options
        quantized_x = _quantized_input(x, input_scale, input_offset, input_key, plain)
        quantized_w = _forward(weight, weight_scale, weight_offset, weight_key, x.dtype, plain)
        return F.linear(quantized_x, quantized_w, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, input_scale, input_offset, weight_scale, weight_offset = ctx.saved_tensors
        input_key, weight_key, plain = ctx.options
        needs = ctx.needs_input_grad
        upper = gradients[0]
        forget_casts()
        rows = upper.reshape(-1, upper.shape[-1])
        found_x: tuple[Tensor | None, ...] = (None, None, None)
        found_w: tuple[Tensor | None, ...] = (None, None, None)
        if needs[0] or needs[3] or needs[4]:
            quantized_w = _forward(weight, weight_scale, weight_offset, weight_key, upper.dtype, plain)
            d_x = (rows @ quantized_w).reshape(x.shape)
            del quantized_w
            asked = needs[0], needs[3], needs[4]
            found_x = _backward(x, input_scale, input_offset, d_x, input_key, asked, plain)
        if needs[1] or needs[5] or needs[6]:
            quantized_x = _quantized_input(x, input_scale, input_offset, input_key, plain).reshape(-1, x.shape[-1])
            d_w = rows.t() @ quantized_x.to(upper.dtype)
            del quantized_x
            asked = needs[1], needs[5], needs[6]
            found_w = _backward(weight, weight_scale, weight_offset, d_w, weight_key, asked, plain)
        d_bias = rows.sum(0).to(ctx.bias_dtype) if needs[2] else None
        return found_x[0], found_w[0], d_bias, *found_x[1:], *found_w[1:], None


_LEVELS: Latest[Tensor] = Latest()


def _quantized_input(x: Tensor, scale: Tensor | None, offset: Tensor | None, key: str | None, plain: bool) -> Tensor:
    """fq(x), made once for all layers in a row that ask for it; only where the range is x's own."""
    if key is None or scale is not None or torch.compiler.is_compiling():
        return _forward(x, scale, offset, key, x.dtype, plain)
    return _LEVELS.of(x.detach(), key, lambda x: forward(x, None, None, key, None, plain))


def _forward(
    x: Tensor, scale: Tensor | None, offset: Tensor | None, key: str | None, dtype: torch.dtype, plain: bool
) -> Tensor:
    return x.to(dtype) if key is None else forward(x, scale, offset, key, dtype, plain)


def _backward(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    gradient: Tensor,
    key: str | None,
    needs: tuple[bool, bool, bool],
    plain: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if key is None:
        return gradient.to(x.dtype), None, None
    return backward(x, scale, offset, gradient, key, needs, plain)
