"""Frozen linears with low-rank adapters as one autograd function a block, which keeps its input and little else.

y_i = x W_i^T + b_i + s_i (m x A_i^T) B_i^T of linears i that share x, m the dropout's mask (Hu 2021, arXiv 2106.09685;
Dettmers 2023, arXiv 2305.14314). One product with all A_i stacked; the adapters are added by the products themselves.
Kept for the backward: x, and (m x) A^T [rows, r]; of a gated MLP also the two outputs before its activation. W is there
for its product alone, each time; where there is room beside it, the adapter is a few columns more of that product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qtrain.kernels.gated import Activation, gated, gated_backward
from qtrain.kernels.lora_columns import Sides


class FrozenWeight(Protocol):
    """A weight [out, in] that does not train, in whatever storage."""

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b [rows, out] of x [rows, in], in x's dtype, in memory of its own."""

    def input_gradient(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        """dy W [rows, in] of dy [rows, out], added to ``into`` if that is given."""


class WidenedWeight(FrozenWeight, Protocol):
    """One that is written anew for each product, and may be with columns of others beside it."""

    def widens(self, dtype: torch.dtype, ranks: Sequence[int]) -> bool:
        """Whether it may in that dtype, and with sums of these numbers of columns on either side."""

    def widened(self, dtype: torch.dtype, before: int, after: int) -> Tensor:
        """[out, before + in + after], W in the middle and the rest to be written."""

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """b [out]."""


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
        ys: tuple[Tensor, ...] = _Products.apply(  # type: ignore[no-untyped-call]
            x, frozen, scalings, compute, _draw(compute.dropout), *factors
        )
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
    seeds = _draw(compute.dropout), _draw(compute.dropout)
    with torch.autocast(x.device.type, enabled=False):
        h, low, passed = _Opened.apply(x, frozen, scalings, activation, compute, seeds, *factors)  # type: ignore[no-untyped-call]
        b = factors[-1].detach()
        y: Tensor = _Down.apply(h, low, passed, frozen[2], b, scalings[2], compute, x.shape)  # type: ignore[no-untyped-call]
    return y


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: tuple[FrozenWeight, ...],
        scalings: tuple[float, ...],
        compute: Compute,
        seed: int,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        part = _Part(frozen, scalings, _Dropout(compute.dropout, seed), *_halves(factors))
        rows = x.reshape(-1, x.shape[-1]).to(compute.dtype)
        ys, low, rows = part.forward(rows)
        ctx.save_for_backward(rows, low, *factors)
        ctx.part, ctx.compute, ctx.shape, ctx.dtype = part.without_factors(), compute, x.shape, x.dtype
        return tuple(_shaped(y, x.shape, compute) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        rows, low, *factors = ctx.saved_tensors
        part = ctx.part.with_factors(*_halves(factors))
        dys = [dy.reshape(-1, dy.shape[-1]).to(ctx.compute.dtype) for dy in gradients]
        d_low, mask = part.low_gradient(dys), part.dropout.mask(rows)
        d_rows = part.input_gradient(dys, d_low, mask) if ctx.needs_input_grad[0] else None
        d_factors = part.factor_gradients(rows, low, d_low, dys, mask, ctx.needs_input_grad[5:])
        return _as_given(d_rows, ctx), None, None, None, None, *d_factors


class _Opened(torch.autograd.Function):
    """(h, low of down, nothing [rows, out]) of x, h = f(gate) * up: all of a gated MLP but its last product.

    All that is kept is kept here, so that recomputation, which ends with the last of it, never comes to that product,
    a fifth of a Llama layer's. Its backward hands dY on as the gradient of the nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: tuple[FrozenWeight, ...],
        scalings: tuple[float, ...],
        activation: Activation,
        compute: Compute,
        seeds: tuple[int, int],
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, b = _halves(factors)
        first = _Part(frozen[:2], scalings[:2], _Dropout(compute.dropout, seeds[0]), a[:2], b[:2])
        second = _Part(frozen[2:], scalings[2:], _Dropout(compute.dropout, seeds[1]), a[2:], b[2:])
        rows = x.reshape(-1, x.shape[-1]).to(compute.dtype)
        (gate, up), low, rows = first.forward(rows)
        h = gated(activation, gate, up)
        low_down = second.low(h)
        ctx.save_for_backward(rows, gate, up, low, low_down, *factors)
        ctx.parts, ctx.activation = (first.without_factors(), second.without_factors()), activation
        ctx.compute, ctx.shape, ctx.dtype = compute, x.shape, x.dtype
        ctx.mark_non_differentiable(low_down)
        ctx.set_materialize_grads(False)
        return h, low_down, rows.new_zeros(()).expand(len(rows), len(b[2]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        rows, gate, up, low, low_down, *factors = ctx.saved_tensors
        a, b = _halves(factors)
        first, second = ctx.parts[0].with_factors(a[:2], b[:2]), ctx.parts[1].with_factors(a[2:], b[2:])
        needs = ctx.needs_input_grad[6:]
        d_hidden, _, *dy = gradients
        d_low_down, mask = second.low_gradient(dy), second.dropout.mask(gate)
        d_hidden = second.through_adapters(d_hidden, d_low_down, mask)
        h, *d_opened = gated_backward(ctx.activation, gate, up, d_hidden)
        d_a_down, d_b_down = second.factor_gradients(h, low_down, d_low_down, dy, mask, (needs[2], needs[5]))
        del h, mask, d_hidden
        d_low, mask = first.low_gradient(d_opened), first.dropout.mask(rows)
        d_rows = first.input_gradient(d_opened, d_low, mask) if ctx.needs_input_grad[0] else None
        wanted = (*needs[:2], *needs[3:5])
        d_a_gate, d_a_up, d_b_gate, d_b_up = first.factor_gradients(rows, low, d_low, d_opened, mask, wanted)
        d_factors = (d_a_gate, d_a_up, d_a_down, d_b_gate, d_b_up, d_b_down)
        return _as_given(d_rows, ctx), None, None, None, None, None, *d_factors


class _Down(torch.autograd.Function):
    """y = h W^T + b + s low B^T, and nothing kept; what the adapter's gradients take is ``_Opened``'s."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        low: Tensor,
        passed: Tensor,
        frozen: FrozenWeight,
        b: Tensor,
        scaling: float,
        compute: Compute,
        shape: torch.Size,
    ) -> Tensor:
        ctx.frozen, ctx.dtype = frozen, compute.dtype
        y = frozen.product(h).addmm_(low, b.to(h.dtype).t(), alpha=scaling)
        return _shaped(y, shape, compute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        dy = gradients[0].reshape(-1, gradients[0].shape[-1]).to(ctx.dtype)
        return ctx.frozen.input_gradient(dy), None, dy, None, None, None, None, None


class _Dropout(NamedTuple):
    """A mask that is drawn again from its seed where it is needed again."""

    share: float
    seed: int

    @property
    def gain(self) -> float:
        """What keeps the mean, 1 / (1 - share): left to a product's factor, for in bf16 it is 0.2 % off."""
        return 1.0 / (1.0 - self.share)

    def mask(self, like: Tensor) -> Tensor | None:
        """m of 0 and 1, in the shape and dtype of its input; None where nothing is dropped."""
        if not self.share:
            return None
        generator = torch.Generator(like.device).manual_seed(self.seed)
        # In the order of its rows, however ``like`` lies: the backward may have x elsewhere.
        mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return mask.bernoulli_(1.0 - self.share, generator=generator)


class _Part(NamedTuple):
    """Linears over one input. Rows: x [rows, in]; low: (m x) A^T / (1 - p) of all, side by side [rows, sum of r]."""

    frozen: tuple[FrozenWeight, ...]
    scalings: tuple[float, ...]
    dropout: _Dropout
    a: tuple[Tensor, ...] = ()
    b: tuple[Tensor, ...] = ()

    def without_factors(self) -> _Part:
        """What autograd need not watch."""
        return self._replace(a=(), b=())

    def with_factors(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> _Part:
        return self._replace(a=a, b=b)

    def forward(self, rows: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """y of each linear, low, and x, which may lie elsewhere now."""
        low = self.low(rows)
        found = self._in_one_product(rows, low) if len(self.frozen) > 1 else None
        if found is not None:
            return found[0], low, found[1]
        ys = []
        for frozen, own, b, scaling in zip(self.frozen, self._split(low), self.b, self.scalings, strict=True):
            y = frozen.product(rows)
            ys.append(y.addmm_(own, b.to(rows.dtype).t(), alpha=scaling))
        return ys, low, rows

    def _in_one_product(self, rows: Tensor, low: Tensor) -> tuple[list[Tensor], Tensor] | None:
        """y = [x, low] [W, s B]^T of each, and x beside low; None where a weight has no room beside it.

        The adapter's part costs 64 / 4096 of the product then, where adding it to y costs a pass over y and back: 7 of
        450 ms a step of a 7B Llama with 4 x 2048 tokens.
        """
        ranks, dtype = self._ranks, rows.dtype
        weights = [cast(WidenedWeight, frozen) for frozen in self.frozen if hasattr(frozen, "widens")]
        if len(weights) < len(self.frozen) or not all(weight.widens(dtype, ranks) for weight in weights):
            return None
        sides = Sides(ranks, rows.shape[1])
        wide = rows.new_empty(len(rows), sides.width)
        wide[:, sides.x].copy_(rows)
        for place, own in zip(sides.lows, self._split(low), strict=True):
            wide[:, place].copy_(own)
        ys = []
        for index, (weight, b, scaling) in enumerate(zip(weights, self.b, self.scalings, strict=True)):
            whole = weight.widened(dtype, *sides.room(index))
            for free in sides.free(index):
                whole[:, free].zero_()
            torch.mul(b, scaling, out=whole[:, sides.factor(index)])
            ys.append(F.linear(wide[:, sides.seen(index)], whole, weight.bias(dtype)))
        return ys, wide[:, sides.x]

    def low(self, rows: Tensor) -> Tensor:
        """(m x) A^T / (1 - p) of all linears."""
        mask = self.dropout.mask(rows)
        seen = rows if mask is None else mask.mul_(rows)
        return _product(seen, self._stacked(rows.dtype).t(), self.dropout.gain)

    def low_gradient(self, dys: Sequence[Tensor]) -> Tensor:
        """dL/d low."""
        d_low = dys[0].new_empty(len(dys[0]), sum(self._ranks))
        for dy, own, b, scaling in zip(dys, self._split(d_low), self.b, self.scalings, strict=True):
            own.addmm_(dy, b.to(dy.dtype), beta=0, alpha=scaling)
        return d_low

    def input_gradient(self, dys: Sequence[Tensor], d_low: Tensor, mask: Tensor | None) -> Tensor:
        """dL/dx: through the frozen weights, then through the adapters."""
        d_rows = self.frozen[0].input_gradient(dys[0])
        for dy, frozen in zip(dys[1:], self.frozen[1:], strict=True):
            d_rows = frozen.input_gradient(dy, d_rows)
        return self.through_adapters(d_rows, d_low, mask)

    def through_adapters(self, d_rows: Tensor, d_low: Tensor, mask: Tensor | None) -> Tensor:
        """``d_rows``, to which the adapters' part of dL/dx is added."""
        dtype = d_low.dtype
        if mask is None:
            return d_rows.addmm_(d_low, self._stacked(dtype))
        return d_rows.addcmul_(mask, _product(d_low, self._stacked(dtype), self.dropout.gain))

    def factor_gradients(
        self,
        rows: Tensor,
        low: Tensor,
        d_low: Tensor,
        dys: Sequence[Tensor],
        mask: Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """dL/dA of each, then dL/dB of each; None where ``needs`` says so. The mask is used up."""
        count = len(self.a)
        d_a: Sequence[Tensor] = ()
        if any(needs[:count]):
            seen = rows if mask is None else mask.mul_(rows)
            d_a = _product(d_low.t(), seen, self.dropout.gain).split(self._ranks)
        found = [own.to(a.dtype) if need else None for own, a, need in zip(d_a, self.a, needs, strict=False)]
        found += [None] * (count - len(found))
        for dy, own, b, scaling, need in zip(dys, self._split(low), self.b, self.scalings, needs[count:], strict=True):
            found.append(_product(dy.t(), own, scaling).to(b.dtype) if need else None)
        return tuple(found)

    def _stacked(self, dtype: torch.dtype) -> Tensor:
        """A of all linears [sum of r, in]."""
        if len(self.a) == 1:
            return self.a[0].to(dtype)
        stacked = self.a[0].new_empty(sum(self._ranks), self.a[0].shape[1], dtype=dtype)
        torch._foreach_copy_(stacked.split(self._ranks), self.a)
        return stacked

    def _split(self, low: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = low.split(self._ranks, 1)
        return parts

    @property
    def _ranks(self) -> list[int]:
        return [len(a) for a in self.a]


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """factor * left @ right, the factor applied before the result is rounded."""
    if factor == 1.0:
        return left @ right
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=factor)


def _halves(factors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    count = len(factors) // 2
    return tuple(factors[:count]), tuple(factors[count:])


def _shaped(y: Tensor, shape: torch.Size, compute: Compute) -> Tensor:
    """[.., out] of x [.., in], not as a view: one made without gradients could not be written to later."""
    shaped: Tensor = torch.ops.aten._unsafe_view(y, [*shape[:-1], y.shape[-1]])
    return shaped.to(compute.result)


def _as_given(d_rows: Tensor | None, ctx: Any) -> Tensor | None:
    return None if d_rows is None else d_rows.view(ctx.shape).to(ctx.dtype)


def _draw(share: float) -> int:
    """A seed from torch's own generator on the CPU, which recomputation sets back."""
    return int(torch.randint(2**62, ())) if share else 0
