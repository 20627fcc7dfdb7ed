"""Frozen linears over one input, with their adapters: the products of a forward and of a backward.

Where a weight is written anew for each product, its adapter is a few columns more of that product, or a few rows: an
adapter's own product would read and write all of y, or of dx, once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.kernels.lora_columns import Sides
from qtrain.kernels.room import Room, lent

Made = dict[str, Any]
"""What the weights of one input make of it, by a name of their own: its codes, say, which each of them multiplies."""


class FrozenWeight(Protocol):
    """A weight [out, in] that does not train, in whatever storage."""

    def product(self, x: Tensor, made: Made) -> Tensor:
        """x W^T + b [rows, out] of x [rows, in], in x's dtype, in memory of its own.

        Args:
            made: of this x so far, to be added to.
        """

    def input_gradient(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        """dy W [rows, in] of dy [rows, out], added to ``into`` if that is given."""


class WidenedWeight(FrozenWeight, Protocol):
    """One that is written anew for each product, and may be with others beside it or below."""

    def widens(self, dtype: torch.dtype, ranks: Sequence[int]) -> bool:
        """Whether it may in that dtype, and with sums of these numbers of columns on either side."""

    def widened(self, dtype: torch.dtype, before: int, after: int) -> Tensor:
        """[out, before + in + after], W in the middle and the rest to be written."""

    def heightened(self, dtype: torch.dtype, below: int) -> Tensor:
        """[out + below, in], W first and the rest to be written."""

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """b [out]."""


class SummedWeight(FrozenWeight, Protocol):
    """One that may be multiplied together with others."""

    def summed_gradient(self, others: Sequence[FrozenWeight], dys: Sequence[Tensor], width: int) -> Tensor | None:
        """The sum of dy W [rows, width] over this weight and others; None where it is to be found one by one."""


class Dropout(NamedTuple):
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


class Part(NamedTuple):
    """Linears over one input. Rows: x [rows, in]; low: (m x) A^T / (1 - p) of all, side by side [rows, sum of r].

    Attributes:
        a: A [r, in] of each. b: B [out, r] of each.
        stack: A of all [sum of r, in], where they lie in one memory.
    """

    frozen: tuple[FrozenWeight, ...]
    scalings: tuple[float, ...]
    dropout: Dropout
    a: tuple[Tensor, ...] = ()
    b: tuple[Tensor, ...] = ()
    stack: Tensor | None = None

    def with_factors(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Part:
        """With those of a step."""
        return self._replace(a=a, b=b)

    def cast(self, dtype: torch.dtype) -> Part:
        """With factors in ``dtype``: one copy and one cast for all of them."""
        factors = (*self.a, *self.b)
        if len(self.a) == 1 or all(factor.dtype == dtype for factor in factors):
            return self._replace(a=_to(self.a, dtype), b=_to(self.b, dtype))
        flat = torch.cat([factor.reshape(-1) for factor in factors]).to(dtype)
        pieces = _pieces(flat, [factor.shape for factor in factors])
        return self._replace(a=pieces[: len(self.a)], b=pieces[len(self.a) :], stack=_side(flat, self.a))

    @property
    def ranks(self) -> list[int]:
        """r of each."""
        return [a.shape[0] for a in self.a]  # len asks through Python

    def widened(self, dtype: torch.dtype) -> Sequence[WidenedWeight] | None:
        """The weights, if all of them may have others beside them."""
        weights = [cast(WidenedWeight, frozen) for frozen in self.frozen if hasattr(frozen, "widens")]
        every = len(weights) == len(self.frozen) and all(weight.widens(dtype, self.ranks) for weight in weights)
        return weights if every else None

    def forward(self, x: Tensor, rows: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """y of each linear, low, and x's rows, which may lie elsewhere now.

        Args:
            x: as it was given. rows: x, as it is multiplied.
        """
        low = self.low(rows)
        weights = self.widened(rows.dtype) if len(self.frozen) > 1 else None
        if weights is not None:
            sides = Sides(self.ranks, rows.shape[1])
            wide = lent(x, rows, self.room(rows.shape[1]))
            if wide is None:
                wide = rows.new_empty(len(rows), sides.width)
                wide[:, sides.x].copy_(rows)
            return self.products(weights, wide, low), low, wide[:, sides.x]
        ys = []
        made: Made = {}
        for frozen, own, b, scaling in zip(self.frozen, self._split(low), self.b, self.scalings, strict=True):
            y = frozen.product(rows, made)
            ys.append(y.addmm_(own, b.to(rows.dtype).t(), alpha=scaling))
        return ys, low, rows

    def room(self, columns: int) -> Room:
        """Beside x for ``products``."""
        sides = Sides(self.ranks, columns)
        return Room(sides.x.start, sides.width - sides.x.stop)

    def products(self, weights: Sequence[WidenedWeight], wide: Tensor, low: Tensor) -> list[Tensor]:
        """y = [x, low] [W, s B]^T of each.

        Args:
            wide: x [rows, in] with ``room`` around it, which is written to.
        """
        sides = Sides(self.ranks, wide.shape[1] - sum(self.ranks))
        for place, own in zip(sides.lows, self._split(low), strict=True):
            wide[:, place].copy_(own)
        ys = []
        for index, (weight, b, scaling) in enumerate(zip(weights, self.b, self.scalings, strict=True)):
            whole = weight.widened(wide.dtype, *sides.room(index))
            for free in sides.free(index):
                whole[:, free].zero_()
            torch.mul(b, scaling, out=whole[:, sides.factor(index)])
            ys.append(F.linear(wide[:, sides.seen(index)], whole, weight.bias(wide.dtype)))
        return ys

    def low(self, rows: Tensor) -> Tensor:
        """(m x) A^T / (1 - p) of all linears."""
        mask = self.dropout.mask(rows)
        seen = rows if mask is None else mask.mul_(rows)
        return product(seen, self.stacked(rows.dtype).t(), self.dropout.gain)

    def low_gradient(self, dys: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """dL/d low."""
        d_low = dys[0].new_empty(len(dys[0]), sum(self.ranks)) if out is None else out
        for dy, own, b, scaling in zip(dys, self._split(d_low), self.b, self.scalings, strict=True):
            own.addmm_(dy, b.to(dy.dtype), beta=0, alpha=scaling)
        return d_low

    def input_gradient(
        self, dys: Sequence[Tensor], d_low: Tensor, mask: Tensor | None, beside: Tensor | None = None
    ) -> Tensor:
        """dL/dx: through the frozen weights and through the adapters.

        Args:
            beside: the last of ``dys`` and ``d_low`` side by side, where all weights widen and nothing is dropped.
        """
        first, *others = self.frozen
        if others and beside is None and hasattr(first, "summed_gradient"):
            found = cast(SummedWeight, first).summed_gradient(others, dys, self.a[0].shape[1])
            if found is not None:
                return self.through_adapters(found, d_low, mask)
        d_rows: Tensor | None = None
        for dy, frozen in zip(dys if beside is None else dys[:-1], self.frozen, strict=False):
            d_rows = frozen.input_gradient(dy, d_rows)
        if beside is None:
            assert d_rows is not None
            return self.through_adapters(d_rows, d_low, mask)
        whole = cast(WidenedWeight, self.frozen[-1]).heightened(beside.dtype, sum(self.ranks))
        for place, a in zip(whole[len(whole) - sum(self.ranks) :].split(self.ranks), self.a, strict=True):
            place.copy_(a)
        return beside @ whole if d_rows is None else d_rows.addmm_(beside, whole)

    def through_adapters(self, d_rows: Tensor, d_low: Tensor, mask: Tensor | None) -> Tensor:
        """``d_rows``, to which the adapters' part of dL/dx is added."""
        stacked = self.stacked(d_low.dtype)
        if mask is None:
            return d_rows.addmm_(d_low, stacked)
        return d_rows.addcmul_(mask, product(d_low, stacked, self.dropout.gain))

    def factor_gradients(
        self,
        rows: Tensor,
        low: Tensor,
        d_low: Tensor,
        dys: Sequence[Tensor],
        mask: Tensor | None,
        needs: Sequence[bool],
        dtypes: Sequence[torch.dtype],
    ) -> tuple[Tensor | None, ...]:
        """dL/dA of each, then dL/dB of each; None where ``needs`` says so. The mask is used up.

        They are written side by side and cast together: a kernel for each took 2 of 450 ms a step of a 7B Llama.

        Args:
            dtypes: of the factors.
        """
        shapes = [factor.shape for factor, need in zip((*self.a, *self.b), needs, strict=True) if need]
        wanted = [dtype for dtype, need in zip(dtypes, needs, strict=True) if need]
        flat = rows.new_empty(sum(shape.numel() for shape in shapes))
        written = iter(_pieces(flat, shapes))
        places = [next(written) if need else None for need in needs]
        count = len(self.a)
        if any(needs[:count]):
            seen = rows if mask is None else mask.mul_(rows)
            if all(needs[:count]):
                product(d_low.t(), seen, self.dropout.gain, _side(flat, self.a))
            else:
                for own, place in zip(self._split(d_low), places, strict=False):
                    if place is not None:
                        product(own.t(), seen, self.dropout.gain, place)
        for dy, own, place, scaling in zip(dys, self._split(low), places[count:], self.scalings, strict=True):
            if place is not None:
                product(dy.t(), own, scaling, place)
        if len(set(wanted)) == 1:
            flat = flat.to(wanted[0])
        found = iter(one.to(dtype) for one, dtype in zip(_pieces(flat, shapes), wanted, strict=True))
        return tuple(next(found) if need else None for need in needs)

    def stacked(self, dtype: torch.dtype) -> Tensor:
        """A of all linears [sum of r, in]."""
        if self.stack is not None and self.stack.dtype == dtype:
            return self.stack
        return (self.a[0] if len(self.a) == 1 else torch.cat(self.a)).to(dtype)

    def _split(self, low: Tensor) -> tuple[Tensor, ...]:
        if len(self.a) == 1:
            return (low,)
        parts: tuple[Tensor, ...] = torch.split_with_sizes(low, self.ranks, 1)
        return parts


def product(left: Tensor, right: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """factor * left @ right, the factor applied before the result is rounded."""
    if factor == 1.0:
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    place = left.new_empty(left.shape[0], right.shape[1]) if out is None else out
    return place.addmm_(left, right, beta=0, alpha=factor)


def _to(factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(factor.to(dtype) for factor in factors)


def _pieces(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """Of one memory, in these shapes."""
    parts = torch.split_with_sizes(flat, [shape.numel() for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _side(flat: Tensor, a: Sequence[Tensor]) -> Tensor:
    """[sum of r, in], where ``flat`` begins with all A."""
    return flat[: sum(one.numel() for one in a)].view(-1, a[0].shape[1])
