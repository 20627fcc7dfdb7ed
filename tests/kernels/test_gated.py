"""h = f(g) u in both ways: plain against float64, in one pass against plain."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.kernels.gated import gated, gated_backward, gated_tiles

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(1,), (3, 5), (7, 333), (2, 3, 1024)]
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
tiles = pytest.mark.skipif(
    gated_tiles is None or not (ON_GPU or INTERPRETED), reason="needs Triton, and a GPU or the interpreter"
)


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    device = "cuda" if ON_GPU else "cpu"
    return [(4 * torch.randn(shape, generator=generator)).to(device, dtype) for _ in range(3)]


@pytest.mark.parametrize("activation", [F.silu, F.gelu, torch.tanh])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4)])
def test_the_backward_is_that_of_autograd(shape: tuple[int, ...], activation: object) -> None:
    gate, up, upper = numbers(shape)
    assert callable(activation)
    g, u = gate.clone().requires_grad_(), up.clone().requires_grad_()
    h = activation(g) * u
    wanted = (h.detach(), *torch.autograd.grad(h, (g, u), upper))
    assert torch.equal(gated(activation, gate, up), wanted[0])
    for found, own in zip(gated_backward(activation, gate, up, upper), wanted, strict=True):
        assert torch.allclose(found, own, rtol=1e-13, atol=1e-13) and not found.requires_grad
    for found, own in zip(gated_backward(activation, gate, up, upper, opened=False)[1:], wanted[1:], strict=True):
        assert torch.allclose(found, own, rtol=1e-13, atol=1e-13)


@tiles
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_pass_is_the_plain_twin(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert gated_tiles is not None
    gate, up, upper = numbers(shape, dtype)
    wanted = gated_backward(F.silu, gate.double(), up.double(), upper.double())
    found = gated_tiles.backward(gate, up, upper)
    for one, other in zip((gated_tiles.forward(gate, up), *found), (wanted[0], *wanted), strict=True):
        assert one.dtype == dtype
        assert torch.allclose(one.double(), other, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    given = gate.clone()
    for one, other in zip(gated_tiles.backward(gate, up, upper, opened=False)[1:], found[1:], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(gate, given)
    d_up = gated_tiles.backward(gate, up, upper, spent=True)[2]
    assert torch.equal(d_up, found[2]) and d_up.data_ptr() == upper.data_ptr()


@tiles
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # NumPy, as the interpreter
def test_strides_and_extremes() -> None:
    assert gated_tiles is not None
    gate, up, upper = (tensor.t() for tensor in numbers((6, 10), torch.float32))
    assert torch.allclose(gated_tiles.forward(gate, up), F.silu(gate) * up, rtol=1e-6, atol=1e-6)
    wanted = gated_tiles.backward(gate.contiguous(), up.contiguous(), upper.contiguous())
    for spent in (False, True):
        for found, own in zip(gated_tiles.backward(gate, up, upper.clone(), spent=spent), wanted, strict=True):
            assert torch.equal(found, own)
    gate = torch.tensor([float("nan"), 200.0, -200.0, 0.0], device=gate.device)
    h, d_gate, d_up = gated_tiles.backward(gate, torch.ones_like(gate), torch.ones_like(gate))
    assert bool(h[0].isnan() and d_gate[0].isnan() and d_up[0].isnan())
    assert torch.equal(h[1:], torch.tensor([200.0, 0.0, 0.0], device=gate.device))
    assert torch.equal(d_gate[1:], torch.tensor([1.0, 0.0, 0.5], device=gate.device))
