"""Gradients of scales of groups in one kernel, beside float64: in the interpreter, or on a Hopper GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from qtrain.kernels import packed_linear
from qtrain.kernels.packed_linear import Packed, range_gradients
from qtrain.numerics.packing import pack
from qtrain.numerics.spec import QuantSpec

triton = pytest.importorskip("triton", reason="CPU installs of torch come without triton")

from qtrain.kernels import group_gradient_tiles as tiles  # noqa: E402

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HOPPER = ON_GPU and torch.cuda.get_device_capability()[0] == 9
DEVICE = "cuda" if ON_GPU else "cpu"
KERNEL = pytest.mark.skipif(not (HOPPER or INTERPRETED), reason="needs a Hopper GPU, or the interpreter")
DTYPE = torch.bfloat16 if HOPPER else torch.float16  # the interpreter has no arithmetic in bf16


def operands(tokens: int, out: int, columns: int, bits: int, group: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens + out + columns + bits)
    dy, x = (torch.randn(tokens, width, generator=generator).to(DTYPE) for width in (out, columns))
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, columns), generator=generator, dtype=torch.int8)
    zero = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, columns // group), generator=generator)
    return dy.to(DEVICE), x.to(DEVICE), codes.to(DEVICE), zero.to(torch.int8).to(DEVICE)


def exact(dy: Tensor, x: Tensor, levels: Tensor, group: int) -> tuple[Tensor, Tensor]:
    gradient = (dy.double().t() @ x.double()).unflatten(1, (-1, group))
    return (gradient * levels.unflatten(1, (-1, group))).sum(-1), gradient.sum(-1)


@KERNEL
@pytest.mark.parametrize("bits", [4, 3, 8])
@pytest.mark.parametrize(
    ("tokens", "out", "columns", "group"), [(64, 128, 256, 128), (200, 136, 320, 64), (70, 304, 544, 32)]
)
def test_it_is_the_sum_over_groups(tokens: int, out: int, columns: int, group: int, bits: int) -> None:
    dy, x, codes, zero = operands(tokens, out, columns, bits, group)
    words, groups = pack(codes, bits), columns // group
    plain = exact(dy, x, codes.double(), group)
    shifted = exact(dy, x, codes.double() - zero.double().repeat_interleave(group, 1), group)
    half = exact(dy, x, codes.double() + 0.5, group)
    for point, mid_rise, wanted in ((None, False, plain), (zero, False, shifted), (None, True, half)):
        for sums in (False, True):
            found = tiles.group_gradient(dy, x, words, bits, groups, point, mid_rise=mid_rise, sums=sums)
            assert (found[0].double() - wanted[0]).norm() <= 2e-5 * wanted[0].norm()
            assert (found[1] is None) == (not sums)
            if found[1] is not None:
                assert (found[1].double() - wanted[1]).norm() <= 2e-5 * wanted[1].norm()


@KERNEL
@pytest.mark.parametrize("trains_zero", [False, True])
def test_a_packed_layer_takes_it(trains_zero: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dy, x, codes, zero = operands(96, 128, 256, 4, 64)
    scale = torch.rand(zero.shape, device=DEVICE) + 0.5
    packed = Packed(pack(codes, 4), 256, QuantSpec("int4", symmetric=False, group_size=64))
    wanted = range_gradients(dy, x, packed, scale, zero, None, trains_zero=trains_zero)
    monkeypatch.setattr(packed_linear, "_tiled", lambda *given: True)
    monkeypatch.setattr(tiles, "fits", lambda *given: True)
    monkeypatch.setattr(packed_linear.packed_tiles, "group_sums", None)  # of the way in parts
    found = range_gradients(dy, x, packed._replace(tiles=True), scale, zero, None, trains_zero=trains_zero)
    for one, own in zip(found, wanted, strict=True):
        assert (one is None) == (own is None)
        if one is not None and own is not None:
            assert (one - own).norm() <= 2e-3 * own.norm()  # products on a CPU are rounded to 16 bits


@KERNEL
def test_rows_further_apart_than_they_are_long() -> None:
    dy, x, codes, _ = operands(96, 256, 512, 4, 64)
    words = pack(codes[:128, 256:].contiguous(), 4)
    found, _ = tiles.group_gradient(dy[:, 128:], x[:, 256:], words, 4, 4, None)
    wanted, _ = exact(dy[:, 128:], x[:, 256:], codes[:128, 256:].double(), 64)
    assert (found.double() - wanted).norm() <= 2e-5 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_what_it_takes() -> None:
    dy, x, _, _ = operands(128, 128, 256, 4, 64)
    assert tiles.fits(dy, x, 64) and tiles.fits(dy, x, 128)
    assert not tiles.fits(dy, x, 256) and not tiles.fits(dy.float(), x.float(), 64)
    assert not tiles.fits(dy[:, 1:], x, 64) and not tiles.fits(dy[:32], x[:32], 64)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_many_tiles_for_each_program() -> None:
    """More than a GPU has processors, so that the loop over tiles is gone through."""
    dy, x, codes, zero = operands(300, 2048, 4096, 4, 128)
    found, _ = tiles.group_gradient(dy, x, pack(codes, 4), 4, 32, zero)
    wanted, _ = exact(dy, x, codes.double() - zero.double().repeat_interleave(128, 1), 128)
    assert (found.double() - wanted).norm() <= 2e-5 * wanted.norm()
