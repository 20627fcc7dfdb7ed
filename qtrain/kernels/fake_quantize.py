"""Fake quantization with a straight-through gradient, eager and compiled alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtrain.numerics.rules import RULES, Gradients, Learned, Rule

try:
    from qtrain.kernels import quantize_rows
except ImportError:  # Triton comes with torch where there is a GPU
    quantize_rows = None  # type: ignore[assignment]


def fake_quantize(x: Tensor, rule: Rule, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """x on the levels of ``rule``, in x's dtype; gradients of x, scale and offset by the rule's backward.

    Where the backward is the identity nothing is saved for it, else x and the scale are.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, offset, rule.key)  # type: ignore[no-untyped-call]
    return result


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, offset: Tensor | None, key: str) -> Tensor:
        ctx.key = key
        if not RULES[key].identity:
            ctx.save_for_backward(x, scale, offset)
        return forward(x, scale, offset, key)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        if RULES[ctx.key].identity:
            return gradient, None, None, None
        x, scale, offset = ctx.saved_tensors
        return *backward(x, scale, offset, gradient, ctx.key, ctx.needs_input_grad[:3]), None


def forward(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    key: str,
    dtype: torch.dtype | None = None,
    plain: bool = False,
) -> Tensor:
    """The rule's forward. Compiled code calls it as one opaque operation: a compiler that contracts or approximates a
    quotient would decide other codes (0.7-1 % of torchao's int4 codes flip under torch.compile in bf16).

    Args:
        dtype: the levels of x's dtype, cast to this one in the same pass.
        plain: in PyTorch's operations even where there is a kernel.
    """
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.qtrain.fake_quantize(x, scale, offset, key, dtype or x.dtype, plain)
        return result
    return _forward(x, scale, offset, key, dtype or x.dtype, plain)


def backward(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    gradient: Tensor,
    key: str,
    needs: tuple[bool, bool, bool],
    plain: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The rule's backward, likewise; the gradient may have another dtype than x."""
    if torch.compiler.is_compiling():
        found = torch.ops.qtrain.fake_quantize_backward(x, scale, offset, gradient, key, list(needs), plain)
        return found[0] if needs[0] else None, found[1] if needs[1] else None, found[2] if needs[2] else None
    return _backward(x, scale, offset, gradient, key, needs, plain)


def _forward(
    x: Tensor, scale: Tensor | None, offset: Tensor | None, key: str, dtype: torch.dtype, plain: bool
) -> Tensor:
    rule = RULES[key]
    if quantize_rows is not None and not plain and quantize_rows.fits(rule, x):
        return quantize_rows.forward(rule, x, scale, offset, dtype)
    return rule.forward(x, scale, offset).to(dtype)


def _backward(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    gradient: Tensor,
    key: str,
    needs: tuple[bool, bool, bool],
    plain: bool,
) -> Gradients:
    rule = RULES[key]
    if quantize_rows is not None and not plain and isinstance(rule, Learned) and quantize_rows.fits(rule, x):
        assert scale is not None
        return quantize_rows.backward(rule, x, scale, offset, gradient, needs)
    return rule.backward(x, scale, offset, gradient.to(x.dtype), needs)


@torch.library.custom_op("qtrain::fake_quantize", mutates_args=())
def _forward_op(
    x: Tensor, scale: Tensor | None, offset: Tensor | None, key: str, dtype: torch.dtype, plain: bool
) -> Tensor:
    return _forward(x, scale, offset, key, dtype, plain)


@_forward_op.register_fake
def _(x: Tensor, scale: Tensor | None, offset: Tensor | None, key: str, dtype: torch.dtype, plain: bool) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("qtrain::fake_quantize_backward", mutates_args=())
def _backward_op(
    x: Tensor, scale: Tensor | None, offset: Tensor | None, gradient: Tensor, key: str, needs: list[bool], plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    found = _backward(x, scale, offset, gradient, key, (needs[0], needs[1], needs[2]), plain)
    return (
        _own(found.x, x.new_empty(0)),
        _own(found.scale, x.new_empty(0)),
        _own(found.offset, x.new_empty(0)),
    )


def _own(value: Tensor | None, absent: Tensor) -> Tensor:
    """An operation of torch.library returns tensors, and none that is one of its inputs."""
    return absent if value is None else value.clone(memory_format=torch.contiguous_format)


@_backward_op.register_fake
def _(
    x: Tensor, scale: Tensor | None, offset: Tensor | None, gradient: Tensor, key: str, needs: list[bool], plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    def like(value: Tensor | None, wanted: bool) -> Tensor:
        if value is None or not wanted:
            return x.new_empty(0)
        return torch.empty_like(value, memory_format=torch.contiguous_format)

    return like(x, needs[0]), like(scale, needs[1]), like(offset, needs[2])
