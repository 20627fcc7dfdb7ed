"""y = fq(x) fq(W)^T + b as one autograd function that saves x and W alone: what a plain linear saves, and no more."""

from __future__ import annotations

from collections.abc import Callable
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
    shared = not torch.compiler.is_compiling()
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        # With and without gradients the cast is not the same: only one of them has a graph.
        name = f"{dtype}, {torch.is_grad_enabled()}"
        x = _CASTS.of(x, name, lambda: x.to(dtype)) if shared else x.to(dtype)
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
        quantized_x = _quantized_input(x, input_scale, input_offset, input_key)
        quantized_w = _forward(weight, weight_scale, weight_offset, weight_key).to(x.dtype)
        return F.linear(quantized_x, quantized_w, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, input_scale, input_offset, weight_scale, weight_offset = ctx.saved_tensors
        input_key, weight_key = ctx.keys
        needs = ctx.needs_input_grad
        upper = gradients[0]
        if not torch.compiler.is_compiling():
            _CASTS.clear()  # it holds a graph
        rows = upper.reshape(-1, upper.shape[-1])
        found_x: tuple[Tensor | None, ...] = (None, None, None)
        found_w: tuple[Tensor | None, ...] = (None, None, None)
        if needs[0] or needs[3] or needs[4]:
            quantized_w = _forward(weight, weight_scale, weight_offset, weight_key).to(upper.dtype)
            d_x = (rows @ quantized_w).reshape(x.shape)
            del quantized_w
            found_x = _backward(x, input_scale, input_offset, d_x, input_key, (needs[0], needs[3], needs[4]))
        if needs[1] or needs[5] or needs[6]:
            quantized_x = _quantized_input(x, input_scale, input_offset, input_key).reshape(-1, x.shape[-1])
            d_w = (rows.t() @ quantized_x.to(upper.dtype)).to(weight.dtype)
            del quantized_x
            found_w = _backward(weight, weight_scale, weight_offset, d_w, weight_key, (needs[1], needs[5], needs[6]))
        d_bias = rows.sum(0).to(ctx.bias_dtype) if needs[2] else None
        return found_x[0], found_w[0], d_bias, *found_x[1:], *found_w[1:], None, None


class _Latest:
    """What was made last of a tensor: q, k and v are given the same input, gate and up too.

    The input is held until another one comes, so that nothing else can lie where it lies; its version tells whether it
    was written to.
    """

    def __init__(self) -> None:
        self._source: tuple[Tensor, int, str] | None = None
        self._made: Tensor | None = None

    def of(self, x: Tensor, name: str, make: Callable[[], Tensor]) -> Tensor:
        if self._made is None or self._source is None or not _same(x, name, *self._source):
            self._source, self._made = (x, _version(x), name), make()
        return self._made

    def clear(self) -> None:
        self._source = self._made = None


def _same(x: Tensor, name: str, known: Tensor, version: int, made: str) -> bool:
    return (
        name == made
        and x.data_ptr() == known.data_ptr()
        and x.shape == known.shape
        and x.stride() == known.stride()
        and x.dtype == known.dtype
        and x.grad_fn is known.grad_fn
        and _version(x) == version
    )


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


_CASTS, _LEVELS = _Latest(), _Latest()


def _quantized_input(x: Tensor, scale: Tensor | None, offset: Tensor | None, key: str | None) -> Tensor:
    """fq(x), made once for all layers in a row that ask for it; only where the range is x's own."""
    if key is None or scale is not None or torch.compiler.is_compiling():
        return _forward(x, scale, offset, key)
    return _LEVELS.of(x.detach(), key, lambda: _forward(x.detach(), None, None, key))


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
