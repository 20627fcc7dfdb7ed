"""Frozen linears with low-rank adapters as one autograd function a block, which keeps its input and little else.

y_i = x W_i^T + b_i + s_i (m x A_i^T) B_i^T of linears i that share x, m the dropout's mask (Hu 2021, arXiv 2106.09685;
Dettmers 2023, arXiv 2305.14314). One product with all A_i stacked; the adapters are added by the products themselves.
Kept for the backward: x, and (m x) A^T [rows, r]; of a gated MLP also the two outputs before its activation. W is there
for its product alone, each time; where there is room beside it, the adapter is a few columns more of that product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtrain.kernels.gated import Activation, gated, gated_backward
from qtrain.kernels.lora_part import Dropout, FrozenWeight, Part
from qtrain.kernels.room import NO_ROOM, Room, around


class LoraLinear(NamedTuple):
    """A frozen linear and its adapter.

    Attributes:
        a: A [r, in]. b: B [out, r].
        scaling: s.
    """

    frozen: FrozenWeight
    a: Tensor
    b: Tensor
    scaling: float


class Compute(NamedTuple):
    """How a block computes.

    Attributes:
        dtype: of its products and of what is kept.
        result: of its outputs.
        dropout: share of the adapters' inputs that is zeroed.
    """

    dtype: torch.dtype
    result: torch.dtype
    dropout: float = 0.0


def lora_products(x: Tensor, linears: Sequence[LoraLinear], compute: Compute) -> tuple[Tensor, ...]:
    """y_i [.., out_i] of x [.., in], one a linear; gradients reach x, A_i and B_i.

    The linears share the mask of a dropout, as in Hu's own layer for q, k and v. Its seed is kept, not the mask.
    """
    frozen = tuple(linear.frozen for linear in linears)
    scalings = tuple(linear.scaling for linear in linears)
    factors = (*(linear.a for linear in linears), *(linear.b for linear in linears))
    with torch.autocast(x.device.type, enabled=False):
        part = _part(frozen, scalings, compute)
        ys: tuple[Tensor, ...] = _Products.apply(x, part, compute, *factors)  # type: ignore[no-untyped-call]
    return ys


def lora_mlp(
    x: Tensor, linears: tuple[LoraLinear, LoraLinear, LoraLinear], activation: Activation, compute: Compute
) -> Tensor:
    """down(f(gate(x)) * up(x)) [.., in] of x [.., in]; gradients reach x and the six factors.

    Args:
        linears: gate, up and down.
        activation: f, one number at a time.
    """
    frozen = tuple(linear.frozen for linear in linears)
    scalings = tuple(linear.scaling for linear in linears)
    factors = (*(linear.a for linear in linears), *(linear.b for linear in linears))
    parts = _part(frozen[:2], scalings[:2], compute), _part(frozen[2:], scalings[2:], compute)
    down = parts[1].with_factors(*((factor.detach(),) for factor in factors[2::3]))
    room = NO_ROOM if down.widened(compute.dtype) is None else down.room(down.a[0].shape[1])
    with torch.autocast(x.device.type, enabled=False):
        h, low, passed = _Opened.apply(x, parts, activation, compute, room, *factors)  # type: ignore[no-untyped-call]
        y: Tensor = _Down.apply(h, low, passed, down, compute, room, x.shape)  # type: ignore[no-untyped-call]
    return y


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part, compute: Compute, *factors: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1]).to(compute.dtype)
        ys, low, rows = part.with_factors(*_halves(factors)).forward(x, rows)
        ctx.save_for_backward(rows, low, *factors)
        ctx.part, ctx.compute, ctx.shape, ctx.dtype = part, compute, x.shape, x.dtype
        return tuple(_shaped(y, x.shape, compute) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        rows, low, *factors = ctx.saved_tensors
        part = ctx.part.with_factors(*_halves(factors)).cast(ctx.compute.dtype)
        dys = [dy.reshape(-1, dy.shape[-1]).to(ctx.compute.dtype) for dy in gradients]
        d_low, mask = part.low_gradient(dys), part.dropout.mask(rows)
        d_rows = part.input_gradient(dys, d_low, mask) if ctx.needs_input_grad[0] else None
        d_factors = part.factor_gradients(rows, low, d_low, dys, mask, ctx.needs_input_grad[3:], _dtypes(factors))
        return _as_given(d_rows, ctx), None, None, *d_factors


class _Opened(torch.autograd.Function):
    """(h, low of down, nothing [rows, out]) of x, h = f(gate) * up: all of a gated MLP but its last product.

    All that is kept is kept here, so that recomputation, which ends with the last of it, never comes to that product,
    a fifth of a Llama layer's. Its backward hands dY on as the gradient of the nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        parts: tuple[Part, Part],
        activation: Activation,
        compute: Compute,
        room: Room,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, second = _with_factors(parts, factors)
        rows = x.reshape(-1, x.shape[-1]).to(compute.dtype)
        (gate, up), low, rows = first.forward(x, rows)
        h = gated(activation, gate, up, room)
        low_down = second.low(h)
        ctx.save_for_backward(rows, gate, up, low, low_down, *factors)
        ctx.parts, ctx.activation = parts, activation
        ctx.compute, ctx.shape, ctx.dtype = compute, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return h, low_down, rows.new_zeros(()).expand(len(rows), len(second.b[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        rows, gate, up, low, low_down, *factors = ctx.saved_tensors
        dtype, needs, dtypes = ctx.compute.dtype, ctx.needs_input_grad[5:], _dtypes(factors)
        first, second = (part.cast(dtype) for part in _with_factors(ctx.parts, factors))
        d_hidden, d_low_down, *dy = gradients
        mask = second.dropout.mask(gate)
        if d_low_down is None:
            d_low_down = second.low_gradient(dy)
            d_hidden = second.through_adapters(d_hidden, d_low_down, mask)
        whole = ctx.needs_input_grad[0] and not first.dropout.share and first.widened(dtype) is not None
        room = Room(after=sum(first.ranks)) if whole else NO_ROOM
        h, *d_opened = gated_backward(ctx.activation, gate, up, d_hidden, room)
        d_down = second.factor_gradients(h, low_down, d_low_down, dy, mask, needs[2::3], dtypes[2::3])
        del h, mask, d_hidden
        beside = around(d_opened[-1], room) if whole else None
        d_low = first.low_gradient(d_opened, None if beside is None else beside[:, -room.after :])
        mask = first.dropout.mask(rows)
        d_rows = first.input_gradient(d_opened, d_low, mask, beside) if ctx.needs_input_grad[0] else None
        others = [index for index in range(len(factors)) if index % 3 < 2]
        d_first = first.factor_gradients(
            rows, low, d_low, d_opened, mask, [needs[i] for i in others], [dtypes[i] for i in others]
        )
        d_factors = (*d_first[:2], d_down[0], *d_first[2:], d_down[1])
        return _as_given(d_rows, ctx), None, None, None, None, *d_factors


class _Down(torch.autograd.Function):
    """y = h W^T + b + s low B^T, and nothing kept; what the adapter's gradients take is ``_Opened``'s.

    Its backward hands on dL/d low where dL/dh = [dY, dL/d low] [W; A] is one product: dY is 0.37 of h in a Llama, to
    which the adapter's part would be added.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, low: Tensor, passed: Tensor, part: Part, compute: Compute, room: Room, shape: torch.Size
    ) -> Tensor:
        ctx.part, ctx.dtype = part, compute.dtype
        weights = part.widened(h.dtype)
        if weights is not None:
            (y,) = part.products(weights, around(h, room), low)
        else:
            y = part.frozen[0].product(h, {}).addmm_(low, part.b[0].to(h.dtype).t(), alpha=part.scalings[0])
        return _shaped(y, shape, compute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        dy = gradients[0].reshape(-1, gradients[0].shape[-1]).to(ctx.dtype)
        part, d_low = ctx.part.cast(ctx.dtype), None
        if part.dropout.share or part.widened(ctx.dtype) is None:
            d_h = part.frozen[0].input_gradient(dy)
        else:
            d_low = part.low_gradient([dy])
            d_h = part.input_gradient([dy], d_low, None, torch.cat([dy, d_low], 1))
        return d_h, d_low, dy, None, None, None, None


def _part(frozen: tuple[FrozenWeight, ...], scalings: tuple[float, ...], compute: Compute) -> Part:
    return Part(frozen, scalings, Dropout(compute.dropout, _draw(compute.dropout)))


def _with_factors(parts: tuple[Part, Part], factors: Sequence[Tensor]) -> tuple[Part, Part]:
    """Those of gate and up, and of down."""
    a, b = _halves(factors)
    return parts[0].with_factors(a[:2], b[:2]), parts[1].with_factors(a[2:], b[2:])


def _dtypes(factors: Sequence[Tensor]) -> list[torch.dtype]:
    return [factor.dtype for factor in factors]


def _halves(factors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    count = len(factors) // 2
    return tuple(factors[:count]), tuple(factors[count:])


def _shaped(y: Tensor, shape: torch.Size, compute: Compute) -> Tensor:
    """[.., out] of x [.., in], in place, not as a view: one made without gradients could not be written to later."""
    assert y.is_contiguous(), y.stride()
    if len(shape) != 2:
        y.resize_(*shape[:-1], y.shape[-1])
    return y.to(compute.result)


def _as_given(d_rows: Tensor | None, ctx: Any) -> Tensor | None:
    return None if d_rows is None else d_rows.view(ctx.shape).to(ctx.dtype)


def _draw(share: float) -> int:
    """A seed from torch's own generator on the CPU, which recomputation sets back."""
    return int(torch.randint(2**62, ())) if share else 0
