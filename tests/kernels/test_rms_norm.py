"""RMSNorm with a frozen weight: plain against float64 and transformers' own, in one pass against plain."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qtrain.kernels import rms_norm as kernel
from qtrain.kernels.rms_norm import frozen_rms_norm

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TILES = pytest.mark.skipif(
    kernel.rms_norm_tiles is None or not (ON_GPU or INTERPRETED), reason="needs Triton, and a GPU or the interpreter"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def example(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, dy = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator).to(DEVICE, dtype)
    return x, weight, dy


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_it_and_its_gradient_are_exact(shape: list[int]) -> None:
    x, weight, _ = (one.double().cpu() for one in example(tuple(shape), torch.float32))
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).double().requires_grad_(False)
    norm.weight.data = weight
    wide = x.requires_grad_()
    r = (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(frozen_rms_norm(x, weight, 1e-5), wide * r * weight)
    assert torch.autograd.gradcheck(lambda x: frozen_rms_norm(x, weight, 1e-5), (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_layer_of_transformers(dtype: torch.dtype) -> None:
    x, weight, dy = example((3, 5, 64), dtype)
    norm = LlamaRMSNorm(64, eps=1e-5).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.data = weight
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = frozen_rms_norm(one, weight, 1e-5), norm(other)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    d_found, d_wanted = torch.autograd.grad(found, one, dy)[0], torch.autograd.grad(wanted, other, dy)[0]
    assert (d_found - d_wanted).float().norm() <= tolerance * d_wanted.float().norm()


@TILES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (4, 4096), (2, 5000)], ids=str)
def test_kernels_are_their_twins(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert kernel.rms_norm_tiles is not None
    x, weight, dy = example(shape, dtype)
    memory = torch.full((len(x), shape[1] + 5), 7.0, dtype=dtype, device=DEVICE)
    y = memory[:, 2:-3]
    r = kernel.rms_norm_tiles.forward(x, weight, 1e-5, y)
    assert bool((memory[:, :2] == 7).all() and (memory[:, -3:] == 7).all())
    wanted, wanted_r = kernel.plain_forward(x, weight, 1e-5)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(r, wanted_r, rtol=1e-5, atol=0)
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    strided = dy.t().contiguous().t()
    found, wanted = kernel.rms_norm_tiles.backward(x, weight, r, strided), kernel.plain_backward(x, weight, r, dy)
    # The two parts of dx, of which nothing is left where a row is one number.
    part = (r.reshape(-1, 1) * dy.float() * weight.float()).norm()
    assert found.dtype == dtype and (found - wanted).float().norm() <= tolerance * part
    apart, again = x.t().contiguous().t(), torch.empty_like(x)
    spread = torch.stack([weight, torch.full_like(weight, 7.0)], 1).flatten()[::2]
    assert torch.equal(kernel.rms_norm_tiles.forward(apart, spread, 1e-5, again), r) and torch.equal(again, y)
    assert torch.equal(kernel.rms_norm_tiles.backward(apart, spread, r, dy), found)


def test_a_weight_that_trains_is_not_taken() -> None:
    x = torch.randn(2, 8, device=DEVICE)
    weight = torch.nn.Parameter(torch.ones(8, device=DEVICE))
    assert not kernel.fits(x, weight) and not kernel.fits(x, None)
    assert kernel.fits(x, weight.detach()) == (ON_GPU and kernel.rms_norm_tiles is not None)
    assert not kernel.fits(x, weight.detach().double())
