"""The product of bytes by programs that stay, beside its plain twin: in the interpreter, or on a Hopper GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.kernels.int8_linear import int8_linear
from qtrain.kernels.int8_matmul import int8_matmul, plain_int8_matmul
from qtrain.numerics.rules import Dynamic
from qtrain.numerics.spec import QuantSpec

triton = pytest.importorskip("triton", reason="CPU installs of torch come without triton")

from qtrain.kernels import int8_bulk  # noqa: E402

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HOPPER = ON_GPU and torch.cuda.get_device_capability()[0] == 9
DEVICE = "cuda" if ON_GPU else "cpu"
KERNEL = pytest.mark.skipif(not (HOPPER or INTERPRETED), reason="needs a Hopper GPU, or the interpreter")


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + n + k)
    a, b = (torch.randint(-128, 128, (rows, k), generator=generator, dtype=torch.int8) for rows in (m, n))
    s, t = (torch.rand(rows, generator=generator) / 1000 for rows in (m, n))
    bias = torch.randn(n, generator=generator).to(dtype)
    return a.to(DEVICE), b.to(DEVICE), s.to(DEVICE), t.to(DEVICE), bias.to(DEVICE)


@KERNEL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(128, 256, 128), (150, 264, 144), (300, 520, 16)], ids=str)
def test_it_is_its_twin(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    a, b, s, t, bias = operands(*size, dtype)
    for scale, own in ((t, bias), (t, None), (None, None)):
        found = int8_bulk.int8_matmul(a, b, s, scale, own, dtype)
        wanted = plain_int8_matmul(a, b, s, scale, own, dtype)
        # A sum of scaled numbers may be rounded the other way where a product and a sum are one operation.
        assert (found.float() - wanted.float()).abs().max() <= 2**-7 * wanted.float().abs().max()
        assert (found != wanted).float().mean() < (0.01 if own is not None else 1e-6)


@KERNEL
@pytest.mark.parametrize("size", [(128, 256, 32), (140, 264, 48)], ids=str)
def test_it_adds_to_what_is_there(size: tuple[int, int, int]) -> None:
    a, b, s, _, _ = operands(*size, torch.bfloat16)
    there = torch.randn(size[0], size[1], generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    wanted = there + plain_int8_matmul(a, b, s, None, None, torch.bfloat16)
    assert int8_bulk.int8_matmul(a, b, s, None, None, torch.bfloat16, there) is there
    assert torch.equal(there, wanted)


@KERNEL
def test_rows_further_apart_than_they_are_long() -> None:
    a, b, s, t, _ = operands(140, 256, 96, torch.bfloat16)
    found = int8_bulk.int8_matmul(a[:, :48], b[:, 32:80], s, t, None, torch.bfloat16)
    assert torch.equal(found, plain_int8_matmul(a[:, :48], b[:, 32:80], s, t, None, torch.bfloat16))


@KERNEL
def test_scales_and_bias_that_lie_apart() -> None:
    a, b, s, t, bias = operands(140, 264, 48, torch.bfloat16)
    wanted = int8_bulk.int8_matmul(a, b, s, t, bias, torch.bfloat16)
    s, t, bias = (torch.stack([one, torch.full_like(one, 7.0)], 1).flatten()[::2] for one in (s, t, bias))
    assert s.stride() == (2,)
    assert torch.equal(int8_bulk.int8_matmul(a, b, s, t, bias, torch.bfloat16), wanted)


@KERNEL
@pytest.mark.parametrize("size", [(128, 1536, 16), (1290, 264, 16), (300, 1104, 16)], ids=str)
def test_programs_that_take_several_tiles(size: tuple[int, int, int]) -> None:
    """One row of tiles, more rows of them than go through the columns together, and a last turn that not all have."""
    tile = int8_bulk.TILE
    tiles = triton.cdiv(size[0], tile.m) * triton.cdiv(size[1], tile.n)
    assert ON_GPU or tiles > int8_bulk.INTERPRETED_PROGRAMS
    a, b, s, t, _ = operands(*size, torch.bfloat16)
    found = int8_bulk.int8_matmul(a, b, s, t, None, torch.bfloat16)
    assert torch.equal(found, plain_int8_matmul(a, b, s, t, None, torch.bfloat16))


@KERNEL
def test_gradients_of_a_layer_whose_products_are_in_bulk(monkeypatch: pytest.MonkeyPatch) -> None:
    """y, dL/dx in bytes and dL/dW, against float64 of the very levels that are multiplied."""
    made: list[tuple[int, ...]] = []

    def counted(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        made.append((len(a), len(b), a.shape[1]))
        return kernel(a, b, *rest)

    kernel = int8_bulk.int8_matmul
    monkeypatch.setattr(int8_bulk, "fits", lambda a, b, dtype: True)
    monkeypatch.setattr(int8_bulk, "int8_matmul", counted)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(130, 288, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
    weight = torch.randn(272, 288, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
    upper = torch.randn(130, 272, generator=generator).to(DEVICE, torch.bfloat16)
    by_row, by_token = (
        Dynamic(QuantSpec(format, granularity=kind, group_size=None, scale_dtype="fp32"))
        for format, kind in (("int4", "per_channel"), ("int8", "per_token"))
    )
    y = int8_linear(x, weight, None, weight_rule=by_row, input_rule=by_token, byte_gradient=True)
    d_x, d_w = torch.autograd.grad(y, (x, weight), upper)
    assert made == [(130, 272, 288), (130, 288, 272)]
    levels, inputs = (rule.forward(of.detach()).double() for rule, of in ((by_row, weight), (by_token, x)))
    for found, exact, within in (
        (y, inputs @ levels.t(), 2**-8),
        (d_x, upper.double() @ levels, 0.02),  # dy is rounded to bytes for it
        (d_w, upper.double().t() @ inputs, 2**-8),
    ):
        assert 0 < float((found.detach().double() - exact).norm()) <= within * float(exact.norm())


@pytest.mark.gpu
def test_more_tiles_than_programs() -> None:
    a, b, s, t, _ = operands(2048, 4104, 272, torch.bfloat16)
    assert int8_bulk.fits(a, b, torch.bfloat16) == HOPPER
    found = int8_matmul(a, b, s, t, None, torch.bfloat16)
    assert torch.equal(found, plain_int8_matmul(a, b, s, t, None, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_what_the_copy_engine_does_not_take() -> None:
    a, b, *_ = operands(256, 256, 160, torch.bfloat16)
    assert int8_bulk.fits(a, b, torch.bfloat16)
    assert not int8_bulk.fits(a[:, 1:], b[:, 1:], torch.bfloat16)  # not aligned
    assert not int8_bulk.fits(a[:, :72].contiguous(), b[:, :72].contiguous(), torch.bfloat16)  # rows of 72 bytes
    assert not int8_bulk.fits(a, b[:252], torch.bfloat16) and not int8_bulk.fits(a, b, torch.float32)
    assert not int8_bulk.fits(a.t().contiguous().t(), b, torch.bfloat16)
