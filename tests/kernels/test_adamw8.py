"""AdamW with moments of 8 bits: plain against float64 and bitsandbytes, in one launch against plain, to the bit."""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qtrain.kernels import adamw8
from qtrain.kernels.adamw8 import AdamW8Step, Maps, Parts, bounds, plain_, starts
from qtrain.training import bnb_optimizers
from qtrain.training.gradients import unless

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL = pytest.mark.skipif(
    not adamw8.has_kernel() or not (ON_GPU or INTERPRETED), reason="needs Triton, and a GPU or the interpreter"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIGNED, UNSIGNED = (create_dynamic_map(signed=signed) for signed in (True, False))
MAPS = Maps.of(SIGNED.to(DEVICE), UNSIGNED.to(DEVICE))
SIZES = (7000, 4097, 256, 300, 2048, 1, 4096)
RATES = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SPECIAL = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-44, 1e25])
CANARY = 77


def inside(x: Tensor) -> Tensor:
    """The same in the middle of a larger piece of memory."""
    around = torch.full((x.numel() + 128,), CANARY, dtype=x.dtype, device=x.device)
    around[64:-64] = x
    return around[64:-64]


def untouched(x: Tensor) -> bool:
    around = torch.as_strided(x, (x.numel() + 128,), (1,), x.storage_offset() - 64)
    return bool((around[:64] == CANARY).all() and (around[-64:] == CANARY).all())


def example(size: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Parts:
    """In the middle of training; some blocks have been nothing so far, and some get nothing."""
    generator = torch.Generator().manual_seed(size + seed)
    weight, gradient = (torch.randn(size, generator=generator) for _ in range(2))
    gradient *= scale * torch.logspace(-3, 1, size)
    codes = [torch.randint(256, (size,), generator=generator, dtype=torch.uint8) for _ in range(2)]
    absmax = [torch.rand(-(-size // 256), generator=generator) * scale**power for power in (1, 2)]
    if size > 600:
        gradient[:8], gradient[256:512] = SPECIAL, 0.0
        for one in absmax:
            one[1::3] = 0.0
    parts = (weight.to(dtype), gradient.to(dtype), *codes, *absmax)
    return Parts(*(inside(part.to(DEVICE)) for part in parts))


def copies(tensors: list[Parts]) -> list[Parts]:
    return [Parts(*(part.cpu().clone() for part in parts)) for parts in tensors]


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """Of float64 x [n]: the code of the nearest value, the even one of two, moved to the side of 0 where x is."""
    away = (x.unsqueeze(1) - values.double()).abs()
    least = away.amin(1, keepdim=True)
    code = torch.where(away == least, torch.arange(256) % 2 * 256 + torch.arange(256), 1000).amin(1) % 256
    negative = values[code] < 0
    return torch.where((x > 0) & negative, code + 1, torch.where((x < 0) & ~negative, code - 1, code))


@pytest.mark.parametrize("values", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_a_number_has_the_code_of_the_nearest_value(values: Tensor) -> None:
    rising = bounds(values)
    between = (values[:-1] + values[1:]) / 2  # in fp32: what is half-way is decided by this number
    generator = torch.Generator().manual_seed(0)
    for x in (values, torch.rand(5000, generator=generator) * 2 - 1, torch.logspace(-12, 0, 5000)):
        x = torch.cat([x, -x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)]).clamp(float(values.min()), 1.0)
        found, wanted = torch.bucketize(x, rising), nearest(x.double(), values)
        # In fp32 half-way is a rounded number.
        clear = ((x.unsqueeze(1) - between).abs() > 2e-7 * x.abs().unsqueeze(1)).all(1) & ((x == 0) | (x.abs() > 1e-37))
        assert torch.equal(found[clear], wanted[clear]) and clear.float().mean() > 0.9
    assert (torch.bucketize(between, rising) % 2 == 0).all()


@pytest.mark.parametrize("values", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_a_start_and_a_few_comparisons_find_it(values: Tensor) -> None:
    rising = bounds(values)
    longer, found = starts(rising)
    more = len(longer) - 255
    assert more <= 2 and found.shape == (2**15,)
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).int().view(torch.float32)
    x = torch.cat([any_bits[~any_bits.isnan()], torch.randn(10_000, generator=generator) / 3, rising, -rising])
    start = found[(x.view(torch.int32).long() & 0xFFFFFFFF) >> 17].long()
    code = start + sum((x > longer[start + one]).long() for one in range(more))
    assert torch.equal(code, torch.bucketize(x, rising))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_plain_is_the_step_in_float64(size: int, dtype: torch.dtype) -> None:
    (parts,) = copies([example(size, dtype)])
    weight, gradient, codes1, codes2, absmax1, absmax2 = (part.clone() for part in parts)
    plain_(parts, AdamW8Step.of(3, **RATES), Maps.of(SIGNED, UNSIGNED))
    block = torch.arange(size) // 256
    g = gradient.double()
    there = (g.isfinite()) & (g.abs() < 1e20)
    m = 0.9 * SIGNED.double()[codes1.int()] * absmax1[block] + (1 - 0.9) * g
    v = 0.999 * UNSIGNED.double()[codes2.int()] * absmax2[block] + (1 - 0.999) * g**2
    moved = weight.double() - 1e-2 * m / (1 - 0.9**3) / ((v / (1 - 0.999**3)).sqrt() + 1e-8)
    wanted = torch.where(there, moved * (1 - 1e-3), weight.double())
    eps = torch.finfo(dtype).eps
    # 0.999 in fp32 is 2e-8 off, of which 1 - 0.999 takes 1e-5, and its root half of it.
    apart = (parts.weight.double() - wanted).nan_to_num().abs()
    assert (
        apart
        <= 0.51 * eps * wanted.abs() + 3e-7 * weight.double().abs() + 1e-5 * (wanted - weight.double()).abs() + 1e-7
    ).all()
    assert torch.equal(parts.weight[~there], weight[~there])
    for moment, values, codes, absmax in zip((m, v), (SIGNED, UNSIGNED), parts[2:4], parts[4:], strict=True):
        moment = torch.where(there, moment, 0.0)
        largest = F.pad(moment.abs(), (0, -size % 256)).view(-1, 256).amax(1)
        torch.testing.assert_close(absmax.double(), largest, rtol=2e-5, atol=1e-44)
        off = codes.int() - nearest(moment / torch.where(largest > 0, largest, 1.0)[block], values)
        assert off.abs().max() <= 1 and (off != 0).float().mean() < 2e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [size for size in SIZES if size > 1])
def test_each_step_is_the_one_of_bitsandbytes(size: int, dtype: torch.dtype) -> None:
    """Of its code for CPUs, which near 0 takes codes that are a few off: they are compared by what they stand for."""
    (ours,) = copies([example(size, dtype)])
    for state in ours[2:]:
        state.zero_()
    for step in range(1, 5):
        gradient = torch.randn(size, generator=torch.Generator().manual_seed(step)).to(dtype)
        ours.gradient.copy_(gradient)
        (theirs,), weight = copies([ours]), ours.weight.clone()
        plain_(ours, AdamW8Step.of(step, **RATES | {"weight_decay": 0.0}), Maps.of(SIGNED, UNSIGNED))
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            *("adam", gradient, theirs.weight, theirs.codes1, theirs.codes2, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-2),
            *(SIGNED, UNSIGNED, theirs.absmax1, theirs.absmax2, 0.0, 1.0, False),
        )
        apart, moved = (ours.weight.double() - theirs.weight).abs(), (theirs.weight.double() - weight).abs()
        assert (apart <= torch.finfo(dtype).eps * theirs.weight.abs() + 1e-5 * moved + 3e-7).all()
        for values, codes, their in zip((SIGNED, UNSIGNED), ours[2:4], theirs[2:4], strict=True):
            away = (values[codes.int()] - values[their.int()]).abs()
            assert away.max() < 0.015 and (away > 1e-4).float().mean() < 0.02
            assert (codes == their).float().mean() > 0.9
        for one, other in zip(ours[4:], theirs[4:], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=0)


@KERNEL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_launch_is_the_plain_steps_to_the_bit(dtype: torch.dtype) -> None:
    ours = [example(size, dtype) for size in SIZES]
    plain = copies(ours)
    assert INTERPRETED or not any(map(adamw8.unfit, ours))
    for step in range(1, 4):
        numbers = AdamW8Step.of(step, **RATES)
        adamw8.adamw8_(ours, numbers, MAPS)
        for parts, twin in zip(ours, plain, strict=True):
            plain_(twin, numbers, Maps.of(SIGNED, UNSIGNED))
            for name, one, other in zip(Parts._fields, parts, twin, strict=True):
                # The interpreter cuts bf16 off.
                close = 2**-7 if name == "weight" and dtype == torch.bfloat16 and not ON_GPU else 0.0
                torch.testing.assert_close(one.cpu(), other, rtol=close, atol=0, equal_nan=True)
            assert all(part.isfinite().all() for part in (parts.weight, *parts[4:]))
            assert all(map(untouched, parts))
            twin.weight.copy_(parts.weight)


@KERNEL
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=3),
    scale=st.sampled_from([1e-22, 1e-12, 1e-4, 1.0, 1e4, 1e12]),
    step=st.integers(1, 10_000),
    seed=st.integers(0, 2**31),
)
def test_any_tensors_of_any_scale(sizes: list[int], scale: float, step: int, seed: int) -> None:
    ours = [example(size, torch.float32, scale, seed) for size in sizes]
    plain = copies(ours)
    numbers = AdamW8Step.of(step, **RATES)
    adamw8.adamw8_(ours, numbers, MAPS)
    for parts, twin in zip(ours, plain, strict=True):
        plain_(twin, numbers, Maps.of(SIGNED, UNSIGNED))
        for one, other in zip(parts, twin, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)
        assert all(untouched(part) for part in parts) and parts.weight.isfinite().all()


def test_what_does_not_fit_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    if not adamw8.has_kernel():
        return
    monkeypatch.setattr(adamw8.adamw8_tiles, "reaches", lambda x: True)
    parts = example(4096, torch.float32)
    assert adamw8.unfit(parts) is None
    for why, field, other in (
        ("weights in float64, gradients in float32", "weight", parts.weight.double()),
        ("gradients in bfloat16", "gradient", parts.gradient.bfloat16()),
        ("16 bytes", "gradient", torch.zeros(4097, device=DEVICE)[1:]),
        ("not contiguous", "weight", torch.zeros(8192, device=DEVICE)[::2]),
        ("other dtypes", "codes1", parts.codes1.float()),
        ("another size", "codes2", parts.codes2[:4095]),
        ("blocks of other than 256", "absmax2", parts.absmax2[:15]),
        ("other dtypes", "absmax1", parts.absmax1.double()),
    ):
        assert why in (adamw8.unfit(parts._replace(**{field: other})) or ""), field
    monkeypatch.setattr(adamw8, "adamw8_tiles", None)
    assert adamw8.unfit(parts) == "not on a GPU with Triton"


@KERNEL
def test_what_is_left_to_bitsandbytes_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(adamw8.adamw8_tiles, "reaches", lambda x: True)
    weights = [torch.nn.Parameter(torch.randn(4096, device=DEVICE)) for _ in range(3)]
    optimizer = bnb_optimizers.AdamW8bit(weights)
    with caplog.at_level(logging.INFO, logger="qtrain"):
        for _ in range(2):
            for index, weight in enumerate(weights):
                weight.grad = torch.randn(4097, device=DEVICE)[1:] if index == 1 else torch.randn(4096, device=DEVICE)
            optimizer.step()
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "bitsandbytes updates 1 of 3 parameters with 8-bit states one by one: "
        "1 not contiguous, or not at a multiple of 16 bytes"
    ]


@KERNEL
def test_the_optimizer_launches_once_for_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones and late ones too: against bitsandbytes' own, to which it goes over in the middle, and back."""
    launched: list[tuple[int, AdamW8Step]] = []
    launch = adamw8.adamw8_tiles.adamw8_

    def noted(table: Any, gradients: list[int], step: AdamW8Step, *others: Any) -> None:
        launched.append((len(gradients), step))
        launch(table, gradients, step, *others)

    monkeypatch.setattr(adamw8.adamw8_tiles, "adamw8_", noted)
    monkeypatch.setattr(adamw8.adamw8_tiles, "reaches", lambda x: True)

    def made(cls: Any) -> tuple[list[Tensor], Any]:
        torch.manual_seed(0)
        shapes = ((70, 100), (300,), (64, 64), (4097,), (80, 80))
        weights = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
        groups = [{"params": weights[:4]}, {"params": weights[4:], "lr": 3e-3}]
        return weights, cls(groups, lr=1e-3, weight_decay=0.0)

    ours, optimizer = made(bnb_optimizers.AdamW8bit)
    theirs, judge = made(bnb.optim.AdamW8bit)
    for step in range(4):
        if step == 2:
            states = optimizer.state_dict(), judge.state_dict()
            optimizer.load_state_dict(states[1])
            judge.load_state_dict(states[0])
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            torch.manual_seed(10 * step + index)
            one.grad = None if index == 3 and step == 0 else torch.randn_like(one)
            other.grad = None if one.grad is None else one.grad.clone()
        launched.clear()
        optimizer.step()
        judge.step()
        assert sorted(count for count, _ in launched) == ([1, 2] if step == 0 else [1, 1, 2])
        for one, other in zip(ours, theirs, strict=True):
            # From codes that are one off a few weights are moved otherwise; a step moves all by some lr.
            apart = (one - other).abs()
            assert apart.max() < 1e-3 and apart.mean() < 1e-5 and (step > 0 or apart.max() < 1e-6)
    assert [optimizer.state[one]["step"] for one in ours] == [4, 4, 4, 3, 4]
    assert optimizer.state[ours[0]]["qmap1"] is optimizer.state[ours[4]]["qmap1"]


@KERNEL
def test_a_factor_is_that_of_the_gradients() -> None:
    ours, scaled = ([example(size, torch.float32) for size in (300, 2048)] for _ in range(2))
    factor = torch.tensor(0.3, device=DEVICE)
    plain = copies(ours)
    adamw8.adamw8_(ours, AdamW8Step.of(2, **RATES), MAPS, factor)
    for parts in scaled:
        parts.gradient.mul_(factor)
    adamw8.adamw8_(scaled, AdamW8Step.of(2, **RATES), MAPS)
    for one, other, twin in zip(ours, scaled, plain, strict=True):
        plain_(twin, AdamW8Step.of(2, **RATES), Maps.of(SIGNED, UNSIGNED), factor.cpu())
        for name in ("weight", "codes1", "codes2", "absmax1", "absmax2"):
            assert torch.equal(getattr(one, name), getattr(other, name))
            assert torch.equal(getattr(one, name).cpu(), getattr(twin, name))


@KERNEL
def test_nothing_is_done_by_a_factor_below_0() -> None:
    """What ``found_inf`` becomes: codes and moments stay too, where gradients are not finite as elsewhere."""
    ours = [example(size, torch.float32) for size in (300, 2048)]
    ours[0].gradient[7] = torch.nan
    plain, before = copies(ours), copies(ours)
    for found, same in ((1.0, True), (0.0, False)):
        factor = unless(torch.tensor(found, device=DEVICE), None)
        adamw8.adamw8_(ours, AdamW8Step.of(2, **RATES), MAPS, factor)
        assert factor is not None
        for one, twin, old in zip(ours, plain, before, strict=True):
            plain_(twin, AdamW8Step.of(2, **RATES), Maps.of(SIGNED, UNSIGNED), factor.cpu())
            for name in ("weight", "codes1", "codes2", "absmax1", "absmax2"):
                assert torch.equal(getattr(one, name).cpu(), getattr(twin, name))
                assert torch.equal(getattr(twin, name), getattr(old, name)) == same


@KERNEL
@pytest.mark.parametrize("tiled", [False, True], ids=["one by one", "together"])
def test_a_step_is_left_out_where_something_is_not_finite(tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it would be a launch, or bitsandbytes'; the next one is taken."""
    monkeypatch.setattr(adamw8.adamw8_tiles, "reaches", lambda x: tiled or x.is_cuda)
    weight = torch.nn.Parameter(torch.randn(64, 70, device=DEVICE))
    optimizer = bnb_optimizers.AdamW8bit([weight], lr=1e-3)
    moved = []
    for found in (None, 0.0, 1.0, 0.0):
        weight.grad = torch.randn_like(weight) if found != 1.0 else torch.full_like(weight, torch.nan)
        optimizer.found_inf = None if found is None else torch.tensor(found, device=DEVICE)
        before = {name: one.clone() for name, one in optimizer.state[weight].items() if isinstance(one, torch.Tensor)}
        old = weight.detach().clone()
        optimizer.step()
        moved.append(not torch.equal(weight, old))
        assert optimizer.found_inf is None
        if found == 1.0:
            assert all(torch.equal(optimizer.state[weight][name], one) for name, one in before.items())
    assert moved == [True, True, False, True] and weight.isfinite().all()


@KERNEL
def test_what_was_updated_together_is_not_come_by_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless something lies elsewhere, or is not there; with a factor of the gradients, and without."""
    monkeypatch.setattr(adamw8.adamw8_tiles, "reaches", lambda x: True)
    visited: list[int] = []
    visit = bnb_optimizers.AdamW8bit.update_step
    monkeypatch.setattr(
        bnb_optimizers.AdamW8bit,
        "update_step",
        lambda self, group, p, gindex, pindex: (visited.append(pindex), visit(self, group, p, gindex, pindex)),
    )

    def made() -> tuple[list[torch.nn.Parameter], Any]:
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in ((70, 100), (64, 64), (4097,))]
        groups = [{"params": weights[:2]}, {"params": weights[2:], "lr": 3e-3}]
        return weights, bnb_optimizers.AdamW8bit(groups, lr=1e-3)

    (ours, optimizer), (theirs, judge) = made(), made()
    expected = {0: 3, 1: 0, 2: 0, 3: 3, 4: 0, 5: 3, 6: 0, 7: 2, 8: 3, 9: 0, 10: 3, 11: 0}
    for step, visits in expected.items():
        factor = torch.tensor(0.5, device=DEVICE) if step % 3 == 1 else None
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            torch.manual_seed(10 * step + index)
            one.grad = torch.randn_like(one)
            other.grad = one.grad * (1.0 if factor is None else 0.5)
        if step == 3:
            optimizer.load_state_dict(optimizer.state_dict())
        if step == 5:
            ours[1].data = ours[1].data.clone()
        if step == 10:
            optimizer.state[ours[0]]["absmax2"] = optimizer.state[ours[0]]["absmax2"].clone()
        if step == 7:
            ours[2].grad = theirs[2].grad = None
        optimizer.gradient_factor = factor
        judge._together = ()
        visited.clear()
        optimizer.step()
        assert len(visited) == visits and optimizer.gradient_factor is None
        judge.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
    assert [optimizer.state[one]["step"] for one in ours] == [12, 12, 11]


@KERNEL
def test_states_that_were_moved_away_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lightning moves them to the host after training."""
    monkeypatch.setattr(adamw8.adamw8_tiles, "reaches", lambda x: True)
    weight = torch.nn.Parameter(torch.randn(64, 64, device=DEVICE))
    optimizer = bnb_optimizers.AdamW8bit([weight], lr=1e-3)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    held = [weakref.ref(optimizer.state[weight][name]) for name in bnb_optimizers.STATES]
    for name in bnb_optimizers.STATES:
        optimizer.state[weight][name] = optimizer.state[weight][name].clone()
    assert [one() for one in held] == [None] * 4
    optimizer.step()
    assert optimizer.state[weight]["step"] == 2
