"""Adapters as columns of their linears' own products, beside the plain sums."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.kernels.lora_columns import Sides
from qtrain.kernels.lora_product import Compute, LoraLinear, lora_mlp, lora_products
from qtrain.kernels.rms_norm import frozen_rms_norm
from qtrain.kernels.room import Room, Spare
from qtrain.modules.frozen_weight import Dense

EXACT = Compute(torch.float64, torch.float64)


class Roomy(Dense):
    """A weight that is written where others were, columns beside it included."""

    memory = torch.empty(4096, dtype=torch.float64)
    asked = below = 0

    def widens(self, dtype: torch.dtype, ranks: Sequence[int]) -> bool:
        return True

    def widened(self, dtype: torch.dtype, before: int, after: int) -> Tensor:
        weight: Tensor = self._layer.weight
        rows, columns = weight.shape
        self.memory.fill_(float("nan"))
        whole = self.memory[: rows * (before + columns + after)].view(rows, -1)
        whole[:, before : before + columns] = weight
        Roomy.asked += 1
        return whole

    def heightened(self, dtype: torch.dtype, below: int) -> Tensor:
        weight: Tensor = self._layer.weight
        self.memory.fill_(float("nan"))
        whole = self.memory[: (len(weight) + below) * weight.shape[1]].view(-1, weight.shape[1])
        whole[: len(weight)] = weight
        Roomy.below += 1
        return whole


def linears(widths: Sequence[tuple[int, int, int]], *, bias: bool) -> list[LoraLinear]:
    """Of (in, out, r) each."""
    torch.manual_seed(len(widths))
    found = []
    for columns, out, rank in widths:
        layer = nn.Linear(columns, out, bias, dtype=torch.float64).requires_grad_(False)
        a = torch.randn(rank, columns, dtype=torch.float64, requires_grad=True)
        b = torch.randn(out, rank, dtype=torch.float64, requires_grad=True)
        found.append(LoraLinear(Roomy(layer), a, b, 0.3 + 0.1 * rank))
    return found


def plain(x: Tensor, linear: LoraLinear) -> Tensor:
    layer = linear.frozen._layer  # type: ignore[attr-defined]
    return F.linear(x, layer.weight, layer.bias) + F.linear(F.linear(x, linear.a), linear.b) * linear.scaling


def with_gradients(ys: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    upper = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in ys]
    return [*ys, *torch.autograd.grad(ys, wanted, upper)]


def check(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and (one - other).norm() <= 1e-12 * other.norm()


@given(ranks=st.lists(st.integers(1, 5), min_size=1, max_size=5), columns=st.integers(1, 9))
def test_every_low_and_x_have_a_place_of_their_own(ranks: list[int], columns: int) -> None:
    sides = Sides(ranks, columns)
    places = [place for part in (sides.x, *sides.lows) for place in range(part.start, part.stop)]
    assert sorted(places) == list(range(sides.width))
    for index, rank in enumerate(ranks):
        seen, (before, after) = sides.seen(index), sides.room(index)
        assert before + columns + after == seen.stop - seen.start
        own, w = sides.factor(index), range(before, before + columns)
        assert own.stop - own.start == rank
        taken = [*range(own.start, own.stop), *w, *(i for gap in sides.free(index) for i in range(gap.start, gap.stop))]
        assert sorted(taken) == list(range(seen.stop - seen.start))
        # s B meets its own low, W meets x
        assert (seen.start + own.start, seen.start + before) == (sides.lows[index].start, sides.x.start)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(0, 3), min_size=0, max_size=2),
    columns=st.integers(1, 9),
    parts=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 4)), min_size=2, max_size=4),
    bias=st.booleans(),
)
def test_one_product_is_the_plain_sum(rows: list[int], columns: int, parts: list[tuple[int, int]], bias: bool) -> None:
    own = linears([(columns, out, rank) for out, rank in parts], bias=bias)
    x = torch.randn(*rows, columns, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(factor for linear in own for factor in (linear.a, linear.b))]
    before = Roomy.asked
    found = lora_products(x, own, EXACT)
    assert Roomy.asked == before + len(own)
    check(with_gradients(found, leaves), with_gradients([plain(x, linear) for linear in own], leaves))


def test_an_mlp_is_products_of_wider_inputs_and_gradients() -> None:
    parts = linears([(5, 6, 2), (5, 6, 1), (6, 4, 3)], bias=True)
    gate, up, down = parts
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(factor for linear in parts for factor in (linear.a, linear.b))]
    before, below = Roomy.asked, Roomy.below
    found = lora_mlp(x, (gate, up, down), F.silu, EXACT)
    assert Roomy.asked == before + 3
    wanted = plain(F.silu(plain(x, gate)) * plain(x, up), down)
    check(with_gradients([found], leaves), with_gradients([wanted], leaves))
    assert Roomy.below == below + 2  # up's with A of both, down's with its own


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout: float) -> None:
    parts = linears([(4, 3, 2), (4, 3, 1), (4, 2, 2)], bias=False)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def products(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)  # the mask is the same in every call
        own = [part._replace(a=others[2 * i], b=others[2 * i + 1]) for i, part in enumerate(parts)]
        return lora_products(x, own, EXACT._replace(dropout=dropout))

    assert torch.autograd.gradcheck(products, (x, *(factor for part in parts for factor in (part.a, part.b))))


@pytest.mark.parametrize("rows", [1, 6])
def test_a_norm_leaves_room_beside_its_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second time on: the first time it is asked to."""
    parts = linears([(5, 6, 2), (5, 3, 1), (5, 4, 3)], bias=False)
    spare, weight = Spare(), torch.linspace(1, 2, 5, dtype=torch.float64)
    seen: list[tuple[int, ...]] = []
    product = F.linear

    def noted(x: Tensor, *others: Tensor | None) -> Tensor:
        seen.append((x.untyped_storage().data_ptr(), *x.stride()))
        return product(x, *others)

    for again in range(3):
        x = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
        leaves = [x, *(factor for linear in parts for factor in (linear.a, linear.b))]
        normed = frozen_rms_norm(x, weight, 1e-5, spare)
        upper = torch.randn_like(normed)
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", noted)
            ys = lora_products(normed, parts, EXACT)
        used = {one[0] for one in seen}
        assert ({normed.untyped_storage().data_ptr()} == used) == (again > 0) and len(used) == 1
        assert spare.room == (5, 1) and all(one[1:] == (11, 1) for one in seen)
        seen.clear()
        other = frozen_rms_norm(x, weight, 1e-5)
        assert torch.equal(normed, other) and other.is_contiguous()
        # Another reader of the norm's output, whose gradient needs it as it was.
        found = with_gradients([*ys, normed.square() * upper], leaves)
        check(found, with_gradients([*(plain(other, part) for part in parts), other.square() * upper], leaves))


def test_readers_that_ask_for_different_room_are_both_right() -> None:
    first, second = linears([(5, 6, 2), (5, 3, 1)], bias=False), linears([(5, 4, 3), (5, 4, 3)], bias=True)
    spare, weight = Spare(), torch.ones(5, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        leaves = [x, *(factor for linear in (*first, *second) for factor in (linear.a, linear.b))]
        normed, other = frozen_rms_norm(x, weight, 1e-5, spare), frozen_rms_norm(x, weight, 1e-5)
        found = [*lora_products(normed, first, EXACT), *lora_products(normed, second, EXACT)]
        check(with_gradients(found, leaves), with_gradients([plain(other, p) for p in (*first, *second)], leaves))


def test_without_gradients_no_room_is_left() -> None:
    spare = Spare()
    spare.room = Room(2, 3)
    x, weight = torch.randn(4, 5, requires_grad=True), torch.ones(5)
    with torch.no_grad():
        assert frozen_rms_norm(x, weight, 1e-5, spare).is_contiguous()
    assert frozen_rms_norm(x.detach(), weight, 1e-5, spare).is_contiguous()
    y = frozen_rms_norm(x, weight, 1e-5, spare)
    assert y.stride() == (10, 1) and torch.equal(y, frozen_rms_norm(x, weight, 1e-5))
