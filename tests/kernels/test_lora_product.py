"""Blocks of LoRA linears beside their plain composition: numbers, gradients, and what is kept for the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.kernels.lora_part import Made
from qtrain.kernels.lora_product import Compute, LoraLinear, lora_mlp, lora_products
from qtrain.modules.frozen_weight import Dense

EXACT = Compute(torch.float64, torch.float64)


def linears(
    widths: Sequence[tuple[int, int, int]], *, bias: bool = True, dtype: Any = torch.float64
) -> list[LoraLinear]:
    """Of (in, out, r) each."""
    torch.manual_seed(len(widths))
    found = []
    for columns, out, rank in widths:
        layer = nn.Linear(columns, out, bias, dtype=dtype).requires_grad_(False)
        a = torch.randn(rank, columns, dtype=dtype, requires_grad=True)
        b = torch.randn(out, rank, dtype=dtype, requires_grad=True)
        found.append(LoraLinear(Dense(layer), a, b, 0.3 + 0.1 * rank))
    return found


def plain(x: Tensor, linear: LoraLinear) -> Tensor:
    """The sum as Hu 2021 writes it."""
    layer = linear.frozen._layer  # type: ignore[attr-defined]
    return F.linear(x, layer.weight, layer.bias) + F.linear(F.linear(x, linear.a), linear.b) * linear.scaling


def factors(parts: Sequence[LoraLinear]) -> list[Tensor]:
    return [factor for part in parts for factor in (part.a, part.b)]


def gradients(ys: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    upper = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in ys]
    return [*ys, *torch.autograd.grad(ys, wanted, upper)]


def near(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-12) -> bool:
    return all(
        one.shape == other.shape and one.dtype == other.dtype and bool((one - other).norm() <= tolerance * other.norm())
        for one, other in zip(found, wanted, strict=True)
    )


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(0, 3), min_size=0, max_size=2),
    columns=st.integers(1, 9),
    parts=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=3),
    bias=st.booleans(),
)
def test_products_and_their_gradients_are_the_plain_ones(
    rows: list[int], columns: int, parts: list[tuple[int, int]], bias: bool
) -> None:
    own = linears([(columns, out, rank) for out, rank in parts], bias=bias)
    x = torch.randn(*rows, columns, dtype=torch.float64, requires_grad=True)
    wanted = gradients([plain(x, linear) for linear in own], [x, *factors(own)])
    found = gradients(lora_products(x, own, EXACT), [x, *factors(own)])
    assert near(found, wanted)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (0, 5), (5,)])
def test_the_mlp_and_its_gradients_are_the_plain_ones(shape: tuple[int, ...], name: str) -> None:
    gate, up, down = linears([(5, 6, 2), (5, 6, 1), (6, 4, 3)])
    act = ACTIVATIONS[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = [x, *factors([gate, up, down])]
    wanted = gradients([plain(act(plain(x, gate)) * plain(x, up), down)], leaves)
    assert near(gradients([lora_mlp(x, (gate, up, down), act, EXACT)], leaves), wanted)


def with_factors(parts: Sequence[LoraLinear], others: Sequence[Tensor]) -> list[LoraLinear]:
    return [part._replace(a=others[2 * i], b=others[2 * i + 1]) for i, part in enumerate(parts)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout: float) -> None:
    compute = EXACT._replace(dropout=dropout)
    parts = linears([(4, 3, 2), (4, 3, 1), (3, 4, 2)])
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def products(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)  # the mask is the same in every call
        return lora_products(x, with_factors(parts[:2], others), compute)

    def mlp(x: Tensor, *others: Tensor) -> Tensor:
        torch.manual_seed(3)
        gate, up, down = with_factors(parts, others)
        return lora_mlp(x, (gate, up, down), F.silu, compute)

    assert torch.autograd.gradcheck(products, (x, *factors(parts[:2])))
    assert torch.autograd.gradcheck(mlp, (x, *factors(parts)))


def test_dropout_is_one_mask_of_the_adapters_input() -> None:
    share, columns = 0.25, 400
    parts = linears([(columns, columns, columns)] * 2)
    layer = parts[0].frozen._layer  # type: ignore[attr-defined]
    with torch.no_grad():
        for part in parts:
            part.frozen._layer.weight.zero_()  # type: ignore[attr-defined]
            part.frozen._layer.bias.zero_()  # type: ignore[attr-defined]
            part.a.copy_(torch.eye(columns))
            part.b.copy_(torch.eye(columns))
    x = torch.ones(50, columns, dtype=torch.float64, requires_grad=True)
    first, second = lora_products(x, parts, EXACT._replace(dropout=share))
    mask = first != 0
    assert torch.equal(mask, second != 0) and layer.weight.count_nonzero() == 0
    assert float(mask.double().mean()) == pytest.approx(1 - share, abs=0.02)
    assert torch.allclose(first[mask], torch.tensor(parts[0].scaling / (1 - share), dtype=torch.float64))
    (d_x,) = torch.autograd.grad(first.sum(), x)  # the mask of the backward
    assert torch.equal(d_x != 0, mask)
    again = lora_products(x, parts, EXACT._replace(dropout=share))[0]
    assert not torch.equal(again != 0, mask)


class OneMemory:
    """A weight that lies where every other lies, for as long as no other is asked for."""

    memory = torch.empty(64, dtype=torch.float64)

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def product(self, x: Tensor, made: Made) -> Tensor:
        return F.linear(x, self.weight(x.dtype))

    def input_gradient(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        return dy @ self.weight(dy.dtype) if into is None else into + dy @ self.weight(dy.dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        self.memory.fill_(float("nan"))
        return self.memory[: self._weight.numel()].view(self._weight.shape).copy_(self._weight)


def test_a_weight_is_used_up_before_the_next_and_never_kept() -> None:
    parts = linears([(5, 6, 2), (5, 6, 1), (6, 5, 3)], bias=False)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *factors(parts)]
    gate, up, down = parts
    wanted = gradients([plain(F.silu(plain(x, gate)) * plain(x, up), down)], leaves)
    gate, up, down = (part._replace(frozen=OneMemory(part.frozen._layer.weight)) for part in parts)  # type: ignore
    seen: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = lora_mlp(x, (gate, up, down), F.silu, EXACT)
    OneMemory.memory.fill_(float("nan"))
    assert near(gradients([y], leaves), wanted)
    assert seen and OneMemory.memory.untyped_storage().data_ptr() not in seen


def kept(run: Callable[[], object], known: Sequence[Tensor]) -> dict[tuple[int, ...], int]:
    """Bytes that autograd holds by shape, each memory once, beside what is known."""
    held = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: dict[tuple[int, ...], int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            held.add(tensor.untyped_storage().data_ptr())
            shape = tuple(tensor.shape)
            found[shape] = found.get(shape, 0) + tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kept_are_the_input_the_low_ranks_and_what_enters_the_activation(dropout: float) -> None:
    tokens, width, inner = 10, 16, 40
    parts = linears([(width, inner, 2), (width, inner, 3), (inner, width, 4)], dtype=torch.float32)
    gate, up, down = parts
    x = torch.randn(2, 5, width, requires_grad=True)
    known = [x, *factors(parts)]
    exact = Compute(torch.float32, torch.float32, dropout)
    assert kept(lambda: lora_products(x, [gate, up], exact), known) == {(tokens, 5): 4 * tokens * 5}
    found = kept(lambda: lora_mlp(x, (gate, up, down), F.silu, exact), known)
    assert found == {(tokens, 5): 4 * tokens * 5, (tokens, 4): 4 * tokens * 4, (tokens, inner): 2 * 4 * tokens * inner}
    half = Compute(torch.bfloat16, torch.float32, dropout)  # of an fp32 input under autocast: one copy in bf16
    found = kept(lambda: lora_products(x, [gate, up], half), known)
    assert found == {(tokens, width): 2 * tokens * width, (tokens, 5): 2 * tokens * 5}


def test_only_wanted_gradients_are_there() -> None:
    parts = linears([(5, 6, 2), (5, 6, 1), (6, 5, 3)])
    gate, up, down = parts[0], parts[1]._replace(a=parts[1].a.detach()), parts[2]._replace(b=parts[2].b.detach())
    x = torch.randn(4, 5, dtype=torch.float64)
    lora_mlp(x, (gate, up, down), F.silu, EXACT).sum().backward()
    assert parts[1].a.grad is None and parts[2].b.grad is None and x.grad is None
    assert all(found is not None for found in (gate.a.grad, gate.b.grad, up.b.grad, down.a.grad))
    y, _ = lora_products(x, [gate, up], EXACT)
    leaves = [gate.a, gate.b]
    assert near(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(plain(x, gate).sum(), leaves))


def test_strides_and_writes() -> None:
    (part,) = linears([(5, 6, 2)])
    base = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    x = base.permute(2, 1, 0)
    (y,) = lora_products(x, [part], EXACT)
    y += 1.0  # an output is no view of anything
    wanted = plain(x, part) + 1.0
    upper = torch.randn(6, 3, 2, dtype=torch.float64).permute(2, 1, 0)
    leaves = [base, part.a, part.b]
    assert near([y, *torch.autograd.grad(y, leaves, upper)], [wanted, *torch.autograd.grad(wanted, leaves, upper)])


def test_bf16_is_as_near_to_the_truth_as_rounding_each_step_is() -> None:
    parts = linears([(64, 96, 4), (64, 96, 4), (96, 64, 4)], dtype=torch.float32)
    exact = [
        LoraLinear(Dense(part.frozen._layer.double()), part.a.double(), part.b.double(), part.scaling)  # type: ignore
        for part in linears([(64, 96, 4), (64, 96, 4), (96, 64, 4)], dtype=torch.float32)
    ]
    x = torch.randn(32, 64)
    gate, up, down = exact
    truth = plain(F.silu(plain(x.double(), gate)) * plain(x.double(), up), down)
    gate, up, down = parts
    ours = lora_mlp(x, (gate, up, down), F.silu, Compute(torch.bfloat16, torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stepwise = plain(F.silu(plain(x, gate)) * plain(x, up), down)
    assert ours.dtype == stepwise.dtype == torch.bfloat16
    with torch.no_grad():
        assert (ours - truth).norm() <= 1.05 * (stepwise - truth).norm() <= 0.02 * truth.norm()
