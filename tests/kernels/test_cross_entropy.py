"""Losses of rows of logits and their gradients: plain against float64, in one pass against plain."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from qtrain.kernels import cross_entropy
from qtrain.kernels.cross_entropy import cross_entropy_, cross_entropy_tiles, plain_

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
tiles = pytest.mark.skipif(
    cross_entropy_tiles is None or not (ON_GPU or INTERPRETED), reason="needs Triton, and a GPU or the interpreter"
)


def example(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if ON_GPU else "cpu"
    logits = (spread * torch.randn(rows, vocab, generator=generator)).to(device, dtype)
    return logits, torch.randint(0, vocab, (rows,), generator=generator).to(device)


def judged(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """By torch alone, in float64."""
    leaf = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(leaf, target, reduction="none")
    losses.sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def assert_right(run: object, logits: Tensor, target: Tensor) -> None:
    losses, gradient = judged(logits, target)
    tolerance = TOLERANCES[logits.dtype]
    assert callable(run)
    kept = logits.clone()
    alone = run(kept, target, gradient=False)
    assert torch.equal(kept, logits)
    found = run(kept, target, gradient=True)
    assert torch.equal(found, alone) and found.dtype == torch.float32 and kept.dtype == logits.dtype
    assert torch.allclose(found.double(), losses, rtol=2e-6, atol=2e-6)
    assert torch.allclose(kept.double(), gradient, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (5, 333)])
def test_plain_against_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_right(plain_, *example(*shape, dtype))


def test_on_a_cpu_it_is_the_plain_one() -> None:
    logits, target = (tensor.cpu() for tensor in example(3, 5, torch.float32))
    twin = logits.clone()
    assert not cross_entropy.one_pass(logits)
    assert torch.equal(cross_entropy_(logits, target, gradient=True), plain_(twin, target, gradient=True))
    assert torch.equal(logits, twin)


@tiles
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 7), (2, 8192), (3, 8193), (2, 20011)])
def test_one_pass_against_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert cross_entropy_tiles is not None
    assert_right(cross_entropy_tiles.cross_entropy_, *example(*shape, dtype))


@tiles
@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 4), vocab=st.integers(1, 70), seed=st.integers(0, 99), spread=st.sampled_from([0.0, 1.0, 300.0])
)
def test_any_shape_and_spread(rows: int, vocab: int, seed: int, spread: float) -> None:
    assert cross_entropy_tiles is not None
    logits, target = example(rows, vocab, torch.float32, seed, spread)
    losses, gradient = judged(logits, target)
    found = cross_entropy_tiles.cross_entropy_(logits, target, gradient=True)
    assert torch.allclose(found.double(), losses, rtol=2e-6, atol=1e-4)
    assert torch.allclose(logits.double(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_factor_is_rounded_with_the_product_alone(dtype: torch.dtype) -> None:
    x, _ = example(3, 9000, dtype)
    factor = torch.tensor(1 / 8188, device=x.device)
    wanted = (x.double() * factor.double()).to(dtype)
    runs = [cross_entropy.scaled]
    if cross_entropy_tiles is not None and (ON_GPU or INTERPRETED):
        runs.append(cross_entropy_tiles.scaled)
    for run in runs:
        found = run(x, factor)
        assert found.dtype == dtype
        assert torch.allclose(
            found.double(), wanted.double(), rtol=2.0 ** -(7 if dtype == torch.bfloat16 else 10), atol=0
        )
        assert (found != wanted).float().mean() < 0.01  # twice rounded: by fp32, and then


@tiles
def test_masked_words_and_nan() -> None:
    """-inf has no share; a NaN is not hidden."""
    assert cross_entropy_tiles is not None
    logits, target = example(3, 12000, torch.float32)
    logits[:, 1:9000] = float("-inf")
    target[:] = 0
    wanted = judged(logits, target)
    logits[1, 5] = float("nan")
    found = cross_entropy_tiles.cross_entropy_(logits, target, gradient=True)
    for row in (0, 2):
        assert torch.allclose(found[row].double(), wanted[0][row], rtol=2e-6)
        assert torch.allclose(logits[row].double(), wanted[1][row], atol=1e-6)
    assert bool(found[1].isnan()) and bool(logits[1].isnan().all())


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_strided_logits_are_left_to_the_plain_one(dtype: torch.dtype) -> None:
    """Their gradient is written where they lie, so the kernel, which reads rows in line, is not to have them."""
    logits, target = example(6, 50, dtype)
    wide = torch.cat([logits, torch.full_like(logits, 9.0)], 1)
    losses, gradient = judged(logits, target)
    for apart in (logits.t().contiguous().t(), wide[:, :50]):
        assert not apart.is_contiguous() and not cross_entropy.one_pass(apart)
        assert torch.equal(cross_entropy.scaled(apart, losses.new_tensor(0.5).float()), logits * 0.5)
        assert torch.allclose(cross_entropy_(apart, target, gradient=True).double(), losses, rtol=2e-6, atol=2e-6)
        assert torch.allclose(apart.double(), gradient, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] / 10)
    assert bool((wide[:, 50:] == 9).all())


@pytest.mark.skipif(cross_entropy_tiles is None, reason="needs Triton")
def test_the_kernel_knows_contiguous_logits_alone() -> None:
    assert cross_entropy_tiles is not None
    with FakeTensorMode():  # a GPU's tensors where there is none
        logits = torch.empty(6, 50, device="cuda")
        assert cross_entropy_tiles.fits(logits)
        assert not cross_entropy_tiles.fits(logits.t())
        assert not cross_entropy_tiles.fits(torch.empty_strided((6, 40), (50, 1), device="cuda"))
        assert not cross_entropy_tiles.fits(logits.double())
        assert not cross_entropy_tiles.fits(torch.empty(0, 50, device="cuda"))
    logits, target = example(6, 50, torch.float32)
    with pytest.raises(AssertionError, match=r"\(1, 50\)"):
        cross_entropy_tiles.cross_entropy_(logits.t(), target, gradient=True)
    with pytest.raises(AssertionError, match=r"\(1, 50\)"):
        cross_entropy_tiles.scaled(logits.t(), torch.tensor(0.5))
