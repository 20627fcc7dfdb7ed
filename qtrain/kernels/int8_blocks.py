"""Layers of bytes (int8 or fp8) that share an input, and a gated MLP of three, as one autograd function each.

y_i = fq(x) fq(W_i)^T + b_i, multiplied as codes (``qtrain.kernels.int8_linear``), with x's codes made once and the
gradients of x added up by the products. A gated MLP keeps x's codes and its two outputs before the activation: what
down multiplies is made again from them, codes straight from SwiGLU.

The norm before them is a kernel of its own: with the codes in one it would spare a write and a read of x, 2 x 28 us of
the 18 ms that a layer of the 7B's width takes for 8,192 tokens at an H200's bandwidth (reckoned; 0.3 %).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtrain.kernels.code_product import code_matmul
from qtrain.kernels.codes import codes, numbers
from qtrain.kernels.fake_quantize import backward, forward
from qtrain.kernels.gated_codes import gated_codes, gated_codes_backward
from qtrain.kernels.int8_linear import gradient_in_bytes
from qtrain.kernels.shared_input import cast_for_product, forget_casts

Found = tuple[Tensor | None, ...]


class ByteLinear(NamedTuple):
    """A layer that multiplies codes.

    Attributes:
        weight: [out, in].
        scale: [out, 1] where the weight's range is kept or learned.
        bias: [out].
        key: of the weight's rule.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    key: str


class _Options(NamedTuple):
    """Keys of the rules of x and of each weight, of a gated MLP's h, and whether dX is a product of bytes."""

    x_key: str
    keys: tuple[str, ...]
    h_key: str
    in_bytes: bool


def int8_products(
    x: Tensor, layers: Sequence[ByteLinear], *, input_key: str, bytes_backward: bool = False
) -> tuple[Tensor, ...]:
    """y_i [.., out_i] of x [.., in], one a layer; each as ``int8_linear`` or ``fp8_linear`` gives it.

    Args:
        input_key: of the rule of x: dynamic, symmetric, by token (fp8: or as a whole).
        bytes_backward: dX as products of bytes too.
    """
    options = _Options(input_key, tuple(layer.key for layer in layers), "", bytes_backward)
    ys: tuple[Tensor, ...] = _Products.apply(  # type: ignore[no-untyped-call]
        cast_for_product(x), options, *_tensors(layers)
    )
    return ys


def int8_mlp(
    x: Tensor, layers: Sequence[ByteLinear], *, input_key: str, hidden_key: str, bytes_backward: bool = False
) -> Tensor:
    """down(silu(gate(x)) * up(x)) of x [.., in].

    Args:
        layers: gate, up and down.
        input_key, hidden_key: of the rules of x and of what down is given.
        bytes_backward: gradients of both as products of bytes too.
    """
    options = _Options(input_key, tuple(layer.key for layer in layers), hidden_key, bytes_backward)
    y: Tensor = _Mlp.apply(cast_for_product(x), options, *_tensors(layers))  # type: ignore[no-untyped-call]
    return y


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: _Options, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        layers = _layers(tensors, options.keys)
        q, s = codes(x.detach(), options.x_key)
        ctx.save_for_backward(q, s, *tensors)
        ctx.options, ctx.shape, ctx.dtype = options, x.shape, x.dtype
        return tuple(_product(q, s, layer, x.dtype).view(*x.shape[:-1], -1) for layer in layers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q, s, *tensors = ctx.saved_tensors
        forget_casts()
        layers = _layers(tensors, ctx.options.keys)
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in gradients]
        d_x = _input_gradient(dys, layers, ctx.options.in_bytes).view(ctx.shape) if ctx.needs_input_grad[0] else None
        needs = ctx.needs_input_grad[2:]
        x = numbers(q, s, ctx.dtype) if any(needs) else None
        return d_x, None, *_layer_gradients(dys, [x] * len(layers), layers, needs)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: _Options, *tensors: Tensor | None) -> Tensor:
        gate, up, down = _layers(tensors, options.keys)
        q, s = codes(x.detach(), options.x_key)
        opened, wide = _product(q, s, gate, x.dtype), _product(q, s, up, x.dtype)
        q_hidden, s_hidden = gated_codes(opened, wide, options.h_key)
        ctx.save_for_backward(q, s, opened, wide, s_hidden, *tensors)
        ctx.options, ctx.shape, ctx.dtype = options, x.shape, x.dtype
        return _product(q_hidden, s_hidden, down, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q, s, opened, wide, s_hidden, *tensors = ctx.saved_tensors
        forget_casts()
        options: _Options = ctx.options
        *first, down = _layers(tensors, options.keys)
        needs = ctx.needs_input_grad[2:]
        dy = [gradients[0].reshape(-1, gradients[0].shape[-1])]
        d_hidden = _input_gradient(dy, [down], options.in_bytes)
        hidden, *d_opened = gated_codes_backward(opened, wide, d_hidden, s_hidden, options.h_key)
        del d_hidden
        found = [_layer_gradients(dy, [hidden], [down], needs[2::3])]
        del hidden
        d_x = _input_gradient(d_opened, first, options.in_bytes).view(ctx.shape) if ctx.needs_input_grad[0] else None
        asked = [need for number, need in enumerate(needs) if number % 3 < 2]
        x = numbers(q, s, ctx.dtype) if any(asked) else None
        found.insert(0, _layer_gradients(d_opened, [x, x], first, asked))
        pairs = zip(_by_kind(found[0], 2), _by_kind(found[1], 1), strict=True)
        return d_x, None, *(gradient for both, one in pairs for gradient in (*both, *one))


def _tensors(layers: Sequence[ByteLinear]) -> Iterable[Tensor | None]:
    """All weights, then all scales, then all biases: autograd looks at each argument, and into none."""
    return (*(it.weight for it in layers), *(it.scale for it in layers), *(it.bias for it in layers))


def _layers(tensors: Sequence[Tensor | None], keys: Sequence[str]) -> list[ByteLinear]:
    found = []
    for weight, scale, bias, key in zip(*_by_kind(tensors, len(keys)), keys, strict=True):
        assert weight is not None
        found.append(ByteLinear(weight, scale, bias, key))
    return found


def _by_kind(values: Sequence[Any], count: int) -> tuple[Sequence[Any], ...]:
    return values[:count], values[count : 2 * count], values[2 * count :]


def _product(q: Tensor, s: Tensor, layer: ByteLinear, dtype: torch.dtype) -> Tensor:
    q_w, s_w = codes(layer.weight, layer.key, layer.scale)
    return code_matmul(q, q_w, s, s_w, None if layer.bias is None else layer.bias.to(dtype), dtype)


def _input_gradient(dys: Sequence[Tensor], layers: Sequence[ByteLinear], in_bytes: bool) -> Tensor:
    """sum_i dY_i fq(W_i) [rows, in]."""
    total: Tensor | None = None
    for dy, layer in zip(dys, layers, strict=True):
        if in_bytes:
            total = gradient_in_bytes(dy, layer.weight, layer.scale, layer.key, total)
            continue
        levels = forward(layer.weight, layer.scale, None, layer.key, dy.dtype)
        total = dy @ levels if total is None else total.addmm_(dy, levels)
    assert total is not None
    return total


def _layer_gradients(
    dys: Sequence[Tensor], xs: Sequence[Tensor | None], layers: Sequence[ByteLinear], needs: Sequence[bool]
) -> Found:
    """dL/dW of each, then of each scale, then of each bias; None where ``needs`` says so."""
    weights, scales, biases = [], [], []
    for dy, x, layer, *asked in zip(dys, xs, layers, *_by_kind(needs, len(layers)), strict=True):
        d_w = d_scale = None
        if asked[0] or asked[1]:
            assert x is not None
            wanted = bool(asked[0]), bool(asked[1]), False
            d_w, d_scale, _ = backward(layer.weight, layer.scale, None, dy.t() @ x.to(dy.dtype), layer.key, wanted)
        weights.append(d_w)
        scales.append(d_scale)
        biases.append(dy.sum(0).to(layer.bias.dtype) if asked[2] and layer.bias is not None else None)
    return *weights, *scales, *biases
