"""The one-pass step of AdamW beside its plain twin, in Triton's interpreter; on a GPU the same cases run compiled."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtrain.kernels import adamw
from qtrain.kernels.adamw import AdamWStep, plain_, stream_keys
from qtrain.training.gradients import unless

triton = pytest.importorskip("triton")

from qtrain.kernels import adamw_tiles  # noqa: E402

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
here = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or the interpreter")
STEP = AdamWStep.of(3, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
BF16, FP32 = torch.bfloat16, torch.float32
KINDS = [(BF16, BF16, BF16), (BF16, BF16, FP32), (FP32, FP32, FP32), (FP32, BF16, BF16)]


def tensors(shape: tuple[int, ...], kinds: tuple[torch.dtype, torch.dtype, torch.dtype]) -> list[Tensor]:
    """w, g, m, v."""
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    found = [torch.randn(shape, generator=generator) * torch.logspace(-4, 1, shape[-1]) for _ in range(4)]
    found[3] = found[3].square()
    if found[0].numel() > 6:
        special = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(BF16).max, 1e-40])
        found[0].view(-1)[:6] = special
    weight, gradient, moments = kinds
    device = "cuda" if ON_GPU else "cpu"
    return [x.to(device, dtype) for x, dtype in zip(found, (weight, gradient, moments, moments), strict=True)]


@here
@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(str(kind).removeprefix("torch.") for kind in kinds))
@pytest.mark.parametrize("shape", [(1,), (3, 5, 48), (67, 31), (2, 1024)], ids=str)
def test_it_takes_the_plain_step(shape: tuple[int, ...], kinds: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    ours, plain = tensors(shape, kinds), tensors(shape, kinds)
    for step in range(2):
        keys = stream_keys(7, step)
        adamw_tiles.adamw_(*ours, STEP, keys)  # type: ignore[call-arg, arg-type]
        plain_(*plain, STEP, keys)  # type: ignore[call-arg, arg-type]
    for one, other in zip(ours, plain, strict=True):
        narrow = one.dtype == BF16
        # On a GPU a product and a sum are one rounding: at the edge of its noise a number goes to the other neighbour.
        close = 0.0 if narrow and not ON_GPU else 2**-7 if narrow else 1e-5 if ON_GPU else 1e-6
        # Where what is added nearly cancels, that one rounding is of numbers of up to 10.
        least = 2e-6 if ON_GPU else 1e-9 if close else 0.0
        torch.testing.assert_close(one.float(), other.float(), rtol=close, atol=least, equal_nan=True)
        different = (one != other) & ~(one.isnan() & other.isnan())
        assert not narrow or float(different.float().mean()) < 0.02


@here
def test_chunks_have_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "CHUNK", 1000)
    shape = (4500,)
    ours, plain = ([torch.ones(shape, dtype=BF16, device="cuda" if ON_GPU else "cpu") for _ in range(4)] for _ in "ab")
    adamw_tiles.adamw_(*ours, STEP, (2**32 - 1, 2**31))  # type: ignore[call-arg, arg-type]
    plain_(*plain, STEP, (2**32 - 1, 2**31))  # type: ignore[call-arg, arg-type]
    assert len(ours[0].unique()) == 2  # up and down
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


@here
@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(str(kind).removeprefix("torch.") for kind in kinds))
@pytest.mark.parametrize("kernel", [adamw_tiles.adamw_, plain_], ids=["tiles", "plain"])
def test_a_factor_is_a_gradient_multiplied_beforehand(
    kernel: Callable[..., None], kinds: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    """In fp32, bit for bit; a gradient in bf16 is not rounded again once it is multiplied."""
    ours, before = tensors((67, 31), kinds), tensors((67, 31), kinds)
    factor = torch.tensor(0.3171, device=ours[0].device)
    before[1] = before[1].float() * factor
    kernel(*ours, STEP, stream_keys(3), factor)
    kernel(*before, STEP, stream_keys(3))
    for one, other in zip((ours[0], *ours[2:]), (before[0], *before[2:]), strict=True):
        # Compiled, the product and the difference from m may be one rounding.
        fused = ON_GPU and kernel is not plain_
        close = 0.0 if not fused else 2**-7 if one.dtype == BF16 else 1e-5
        torch.testing.assert_close(one, other, rtol=close, atol=1e-9 if close else 0.0, equal_nan=True)


@here
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("tiled", [False, True])
def test_nothing_is_done_by_a_factor_below_0(together: bool, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``found_inf`` becomes; numbers that are not finite stay where they are."""
    monkeypatch.setattr(adamw_tiles, "fits", lambda x: tiled)
    ours = tensors((67, 31), KINDS[0])
    ours[1][3] = torch.nan
    before = [one.clone() for one in ours]
    for found, same in ((1.0, True), (0.0, False)):
        factor = unless(torch.tensor(found, device=ours[0].device), torch.tensor(0.5, device=ours[0].device))
        parts = adamw.Parts(*ours, stream_keys(3))  # type: ignore[arg-type]
        if together:
            adamw.adamw_all_([parts], STEP, factor)
        else:
            adamw.adamw_(*parts[:4], STEP, parts.keys, factor)
        for one, old in zip((ours[0], *ours[2:]), (before[0], *before[2:]), strict=True):
            assert bool(((one == old) | one.isnan() & old.isnan()).all()) == same
    assert before[0][3].isfinite().all() and ours[0][3].isnan().all()


@here
@pytest.mark.parametrize("factor", [None, 0.37])
def test_small_tensors_share_a_launch(factor: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of storage, aligned or not; a large one, and one that does not lie in one piece, go alone."""
    launches: list[int] = []
    launch = adamw_tiles.adamw_all_

    def noted(tensors: list[tuple[Tensor, ...]], *others: object) -> None:
        launches.append(len(tensors))
        launch(tensors, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(adamw_tiles, "adamw_all_", noted)
    monkeypatch.setattr(adamw_tiles, "fits", lambda x: x.numel() > 0)  # as if it lay on a GPU
    monkeypatch.setattr(adamw_tiles, "LARGE", 10_000)
    shapes = [(1,), (48,), (67, 31), (5, 1024), (4096,), (100, 100)]
    ours = [tensors(shape, kinds) for kinds in KINDS for shape in shapes]
    for own in ours[1::6]:
        own[1] = torch.cat([own[1].new_zeros(1), own[1]])[1:]  # a gradient at an odd place
    ours.append([one.t() for one in tensors((64, 32), KINDS[0])])
    ours[-1][2:] = [one.contiguous() for one in ours[-1][2:]]
    alone = [[one.clone() for one in own] for own in ours]
    given = None if factor is None else torch.tensor(factor, device=ours[0][0].device)
    for step in range(2):
        keys = [stream_keys(step, number) for number in range(len(ours))]
        parts = [adamw.Parts(*own, pair) for own, pair in zip(ours, keys, strict=True)]  # type: ignore[arg-type]
        adamw.adamw_all_(parts, STEP, given)
        for own, pair in zip(alone, keys, strict=True):
            adamw.adamw_(*own, STEP, pair, given)  # type: ignore[call-arg, arg-type]
        assert sorted(launches) == [2] * 4 + [3] * 4
        launches.clear()
    for own, other in zip(ours, alone, strict=True):
        for one, twin in zip(own, other, strict=True):
            # Compiled, the two may fuse other products with sums.
            close = 0.0 if not ON_GPU else 2**-7 if one.dtype == BF16 else 1e-5
            torch.testing.assert_close(one, twin, rtol=close, atol=2e-6 if ON_GPU else 0.0, equal_nan=True)
