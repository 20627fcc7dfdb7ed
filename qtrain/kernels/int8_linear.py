"""y = fq(x) fq(W)^T + b as a product of bytes: the arithmetic of deployment, with a straight-through backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtrain.kernels.code_product import code_matmul
from qtrain.kernels.codes import codes, numbers, turned
from qtrain.kernels.fake_quantize import backward, forward
from qtrain.kernels.int8_matmul import int8_matmul, int8_matmul_into
from qtrain.kernels.shared_input import Latest, cast_for_product, forget_casts
from qtrain.numerics.rules import Dynamic, Learned, Rule, Static
from qtrain.numerics.spec import INTEGER_BITS, QuantSpec

ROW_BYTES = Dynamic(QuantSpec("int8", granularity="per_token", group_size=None, scale_dtype="fp32"))
"""How rows of an output's gradient become bytes where its product is one of bytes too."""


def int8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    weight_rule: Rule,
    input_rule: Rule,
    weight_scale: Tensor | None = None,
    byte_gradient: bool = False,
) -> Tensor:
    """Linear layer whose forward multiplies codes: y[t, o] = s_x[t] s_w[o] sum_k q_x[t, k] q_w[o, k] + b[o].

    The codes are those of ``quantized_linear``; the sum is exact and rounded to x's dtype once, where the simulated
    product rounds each level to that dtype first. Saved for the backward: q_x, a byte a number, with s_x, and W.
    Backward, straight through: dX = dY fq(W), dW = dY^T fq(X) and what W's rule makes of it, in dY's dtype.

    Args:
        x: [.., in]. weight: [out, in]. bias: [out].
        weight_scale: [out, 1], of a range that is kept or learned.
        byte_gradient: dX too is a product of bytes: dY s_w rounded to int8 by token, times q_w (SwitchBack's dX,
            Wortsman 2023, arXiv 2304.13013, with the weight's own codes). dW is not.
    """
    return code_linear(
        x,
        weight,
        bias,
        weight_rule=weight_rule,
        input_rule=input_rule,
        weight_scale=weight_scale,
        byte_gradient=byte_gradient,
    )


def code_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    weight_rule: Rule,
    input_rule: Rule,
    weight_scale: Tensor | None,
    byte_gradient: bool = False,
) -> Tensor:
    """``int8_linear``, or ``fp8_linear`` where the rules are of fp8, without a gradient in bytes."""
    result: Tensor = _CodeLinear.apply(  # type: ignore[no-untyped-call]
        cast_for_product(x), weight, bias, weight_scale, input_rule.key, weight_rule.key, byte_gradient
    )
    return result


def lacks_int8_product(weight: Rule | None, inputs: Rule | None) -> str | None:
    """Why a layer of these rules has no product of bytes; None where it has one."""
    if weight is None or inputs is None:
        return "inputs are not quantized" if inputs is None else "weights are not quantized"
    if type(inputs) is not Dynamic or inputs.spec.granularity != "per_token":
        return "inputs are not dynamic by token"
    if inputs.spec.is_float:
        return f"inputs are {inputs.spec.format}, no integers"
    if inputs.spec.format not in INTEGER_BITS or not inputs.spec.symmetric or inputs.spec.mid_rise:
        return "inputs are no symmetric integers"
    spec = weight.spec
    if type(weight) not in (Dynamic, Learned, Static) or spec.is_float or not spec.symmetric:
        return "weights are no symmetric integers"
    if spec.granularity != "per_channel":
        return f"weights have scales {spec.granularity}, not one a row"
    return "half-integer levels of 8 bits are no bytes" if spec.mid_rise and spec.bits == 8 else None


class _CodeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_scale: Tensor | None,
        input_key: str,
        weight_key: str,
        byte_gradient: bool,
    ) -> Tensor:
        q_x, s_x = _input_codes(x.detach(), input_key)
        q_w, s_w = codes(weight, weight_key, weight_scale)
        trains_weight = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(*((q_x, s_x) if trains_weight else (None, None)), weight, weight_scale)
        ctx.shape, ctx.dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        ctx.weight_key, ctx.byte_gradient = weight_key, byte_gradient
        # As bf16 products have it: the bias in the product's dtype.
        own_bias = None if bias is None else bias.to(x.dtype)
        return code_matmul(q_x, q_w, s_x, s_w, own_bias, x.dtype).view(*x.shape[:-1], len(q_w))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_x, s_x, weight, weight_scale = ctx.saved_tensors
        needs = ctx.needs_input_grad
        forget_casts()
        upper = gradients[0]
        rows = upper.reshape(-1, upper.shape[-1])
        d_x = d_bias = None
        found_w: tuple[Tensor | None, ...] = (None, None, None)
        if needs[0]:
            product = gradient_in_bytes if ctx.byte_gradient else _gradient
            d_x = product(rows, weight, weight_scale, ctx.weight_key).view(ctx.shape)
        if needs[1] or needs[3]:
            d_w = rows.t() @ _levels(q_x, s_x, ctx.dtype).to(upper.dtype)
            found_w = backward(weight, weight_scale, None, d_w, ctx.weight_key, (needs[1], needs[3], False))
        if needs[2]:
            d_bias = rows.sum(0).to(ctx.bias_dtype)
        return d_x, found_w[0], d_bias, found_w[1], None, None, None


def _gradient(rows: Tensor, weight: Tensor, scale: Tensor | None, key: str) -> Tensor:
    return rows @ forward(weight, scale, None, key, rows.dtype)


def gradient_in_bytes(
    rows: Tensor, weight: Tensor, scale: Tensor | None, key: str, into: Tensor | None = None
) -> Tensor:
    """dY fq(W) with dY s_w in bytes, added to ``into``: the scales of the summed rows of W belong to the left side."""
    q_w, s_w = codes(weight, key, scale)
    q_y, s_y = codes(rows, ROW_BYTES.key, factor=s_w)
    if into is not None:
        return int8_matmul_into(into, q_y, turned(q_w), s_y)
    return int8_matmul(q_y, turned(q_w), s_y, None, None, rows.dtype)


_CODES: Latest[tuple[Tensor, Tensor]] = Latest()
_LEVELS: Latest[Tensor] = Latest()


def _input_codes(x: Tensor, key: str) -> tuple[Tensor, Tensor]:
    """Made, and kept for the backward, once for all layers in a row that ask for it."""
    if torch.compiler.is_compiling():
        return codes(x, key)
    return _CODES.of(x, key, lambda x: codes(x, key))


def _levels(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():
        return numbers(q, s, dtype)
    return _LEVELS.of(q, str(dtype), lambda q: numbers(q, s, dtype))
