"""Packed integers in Triton beside their plain twins and float64; in the interpreter where there is no GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.config.compose import load_recipe
from qtrain.kernels import packed_linear as kernel
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.record import LinearRecord, Outliers
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
tiles = pytest.mark.skipif(
    kernel.packed_tiles is None or not (ON_GPU or INTERPRETED), reason="needs Triton, and a GPU or the interpreter"
)
# (out, in, group size or None): one tile, several, odd widths, groups that are no power of two, longer than a tile
SHAPES = [
    (5, 24, 8),
    (130, 72, 24),
    (9, 514, 257),
    (3, 40, None),
    (17, 300, 100),
    (2, 1032, 4),
    (140, 300, None),
    (3, 2112, 1056),
]


def layer_of(shape: tuple[int, int, int | None], *, zero: str | None = None, outliers: int = 0, **keys: Any) -> Any:
    """A packed layer whose scales train; ``zero``: no zero points, whole, any, or trained ones."""
    out, columns, group = shape
    granularity = "per_channel" if group is None else "per_group"
    spec = QuantSpec(**{"symmetric": zero is None, "granularity": granularity, "group_size": group} | keys)
    generator = torch.Generator().manual_seed(out + columns)
    weight = torch.randn(out, columns, generator=generator)
    qparams = choose_qparams(weight, spec)
    taken = None
    if outliers:
        index = torch.randperm(weight.numel(), generator=generator)[:outliers].sort().values
        taken = Outliers(index.to(torch.int32), (3 * weight.flatten()[index]).to(qparams.scale.dtype))
    points = qparams.zero_point
    if zero == "any" and points is not None:
        points = points.float() + 0.375
    layer = PackedLinear.from_record(LinearRecord(quantize(weight, qparams, spec), qparams.scale, points, spec, taken))
    layer.train_ranges(zero_points=zero == "trained")
    with torch.no_grad():
        layer.scale.mul_(1.0007)
    return layer.to(DEVICE)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels run where the interpreter does."""
    assert kernel.packed_tiles is not None
    monkeypatch.setattr(kernel.packed_tiles, "fits", lambda tensor, dtype: dtype in DTYPES and tensor.numel() > 0)


@tiles
@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("format", [f"int{bits}" for bits in range(2, 9)] + ["ternary"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_the_twins_bit_for_bit(shape: tuple[int, int, int | None], format: str) -> None:
    for zero, dtype in zip(("whole", "any", "trained"), DTYPES, strict=True):
        layer = layer_of(shape, zero=None if format == "ternary" else zero, format=format, outliers=3)
        layer.tiles = False
        expected = layer.dense_weight(dtype)
        layer.tiles = True
        assert torch.equal(layer.dense_weight(dtype), expected)


@tiles
@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("keys", [{"mid_rise": True}, {"scale_dtype": "fp32"}, {"scale_dtype": "bf16"}], ids=str)
def test_other_levels_and_scales(keys: dict[str, Any]) -> None:
    layer = layer_of((6, 48, 16), format="int3", **keys)
    for dtype in DTYPES:
        layer.tiles = False
        expected = layer.dense_weight(dtype)
        layer.tiles = True
        assert torch.equal(layer.dense_weight(dtype), expected)


def gradients(layer: Any, x: Tensor, mix: Tensor, tiles: bool) -> dict[str, Tensor]:
    layer.tiles = tiles
    layer.zero_grad()
    own = x.detach().clone().requires_grad_()
    (layer(own) * mix).sum().backward()
    found = {"x": own.grad, "scale": layer.scale.grad, "zero": None if layer.zero is None else layer.zero.grad}
    return {name: value.clone() for name, value in found.items() if value is not None}


@tiles
@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [None, "whole", "trained"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_float64(
    shape: tuple[int, int, int | None], zero: str | None, dtype: torch.dtype
) -> None:
    """Zero points, outliers, and one scale a row whose zero point trains; 70 tokens are no whole tiles."""
    if not ON_GPU:  # the interpreter takes a row at a time here, each as the others
        shape = (min(shape[0], 20), *shape[1:])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 35, shape[1], generator=generator).to(DEVICE, dtype)
    mix = torch.randn(2, 35, shape[0], generator=generator).to(DEVICE, dtype)
    layer = layer_of(shape, zero=zero, format="int3", outliers=4)
    exact = gradients(layer, x.double(), mix.double(), tiles=False)
    found = gradients(layer, x, mix, tiles=True)
    assert found.keys() == exact.keys() and ("zero" in found) == (zero == "trained")
    for name in ("scale", "zero"):
        if name in found:
            # On a GPU the product is added up and kept in fp32, whatever the dtype of what is multiplied.
            within = 1e-5 if ON_GPU or dtype == torch.float32 else 1e-2
            assert (found[name] - exact[name]).norm() < within * exact[name].norm()
    assert torch.equal(found["x"], gradients(layer, x, mix, tiles=False)["x"])


@tiles
@pytest.mark.usefixtures("anywhere")
def test_strides_and_nothing_at_all() -> None:
    layer = layer_of((24, 32, 8), zero="trained", format="int4")
    x = torch.randn(32, 40, device=DEVICE).t()
    mix = torch.randn(24, 40, device=DEVICE).t()
    exact = gradients(layer, x.double(), mix.double(), tiles=False)
    found = gradients(layer, x, mix, tiles=True)
    assert all(torch.allclose(found[name].double(), exact[name].double(), atol=1e-4) for name in ("scale", "zero"))
    layer.tiles = True
    layer.zero_grad()
    layer(torch.zeros(0, 32, device=DEVICE, requires_grad=True)).sum().backward()
    assert not layer.scale.grad.any() and not layer.zero.grad.any()


@tiles
@pytest.mark.usefixtures("anywhere")
def test_rows_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 4 * 20 * 4)
    layer = layer_of((11, 20, 10), zero="trained", format="int4", outliers=3)
    x, mix = torch.randn(40, 20, device=DEVICE), torch.randn(40, 11, device=DEVICE)
    exact = gradients(layer, x.double(), mix.double(), tiles=False)
    found = gradients(layer, x, mix, tiles=True)
    assert all(torch.allclose(found[name].double(), exact[name].double(), atol=1e-4) for name in ("scale", "zero"))


@tiles
@pytest.mark.usefixtures("anywhere")
def test_the_same_bits_each_time() -> None:
    layer = layer_of((9, 514, 257), format="int4")
    x, mix = torch.randn(70, 514, device=DEVICE), torch.randn(70, 9, device=DEVICE)
    first, second = (gradients(layer, x, mix, tiles=True)["scale"] for _ in range(2))
    assert torch.equal(first, second)


@tiles
@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("tokens", [1, 31, 512, 1100])
def test_sums_over_tokens(tokens: int) -> None:
    """Of a layer with one scale a row and a bias: rows of the outputs, not of the weight."""
    layer = layer_of((140, 24, None), format="int4")
    layer.bias = torch.nn.Parameter(torch.randn(140, device=DEVICE), requires_grad=False)
    x, mix = torch.randn(tokens, 24, device=DEVICE), torch.randn(tokens, 140, device=DEVICE)
    exact = gradients(layer, x.double(), mix.double(), tiles=False)["scale"]
    found = gradients(layer, x, mix, tiles=True)["scale"]
    assert found.shape == (140, 1) and (found - exact).norm() < 1e-5 * exact.norm()


def test_the_choice_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert kernel.choose_tiles("plain", gpu) == (False, "PyTorch's own operations")
    monkeypatch.setattr(kernel, "packed_tiles", None)
    assert kernel.choose_tiles("triton", gpu) == (False, "PyTorch's own operations: those in Triton need Triton")
    monkeypatch.setattr(kernel, "packed_tiles", kernel)
    assert kernel.choose_tiles("triton", cpu) == (False, "PyTorch's own operations: those in Triton need a GPU")
    for asked in ("auto", "triton"):
        assert kernel.choose_tiles(asked, gpu) == (True, "Triton: dequantization, sums of scales' gradients")
    config = load_recipe(None, "method.name=peqa", "method.kernels=triton")
    assert config.method.model_dump()["kernels"] == "triton"
