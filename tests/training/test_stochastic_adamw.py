"""AdamW in bf16: unbiased beside one in float64, alive where rounding to nearest stands still, resumed to the bit."""

from __future__ import annotations

import copy
import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.config.compose import load_recipe
from qtrain.config.schema import OptimizerSection
from qtrain.errors import ConfigError
from qtrain.training.module import LanguageModule
from qtrain.training.optimizers import build_optimizer, state_bytes
from qtrain.training.stochastic_adamw import StochasticAdamW

BF16, FP32 = torch.bfloat16, torch.float32
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def parameter(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradients(shape: torch.Size, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(BF16) for _ in range(count)]


def trained(weight: nn.Parameter, steps: list[Tensor], optimizer: torch.optim.Optimizer) -> nn.Parameter:
    for gradient in steps:
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    return weight


def ulp(x: Tensor) -> Tensor:
    """The distance of bf16's numbers at x."""
    return torch.exp2(x.double().abs().log2().floor() - 7)


@pytest.mark.parametrize("moments", [BF16, FP32])
def test_one_step_lands_beside_the_exact_one(moments: torch.dtype) -> None:
    weight = parameter(80, 70)
    exact = nn.Parameter(weight.detach().double())
    steps = gradients(weight.shape, 1)
    trained(exact, steps, torch.optim.AdamW([exact], **OPTIONS))
    trained(weight, steps, StochasticAdamW([{"params": [weight]}], moments=moments, **OPTIONS))
    distance = (weight.detach().double() - exact.detach()).abs() / ulp(exact.detach())
    assert float(distance.max()) < 1.001


@pytest.mark.parametrize("moments", [BF16, FP32])
def test_the_mean_of_many_runs_is_the_exact_run(moments: torch.dtype) -> None:
    runs, start = 3000, parameter(8)
    steps = gradients(start.shape, 12)
    exact = nn.Parameter(start.detach().double())
    trained(exact, steps, torch.optim.AdamW([exact], **OPTIONS))
    many = nn.Parameter(start.detach().repeat(runs, 1))  # each row has bits of its own
    optimizer = StochasticAdamW([{"params": [many]}], moments=moments, **OPTIONS)
    trained(many, [step.repeat(runs, 1) for step in steps], optimizer)
    found = many.detach().double()
    assert float(found.std(0).min()) > 0
    errors = (found.mean(0) - exact.detach()) / (found.std(0) / math.sqrt(runs))
    # Moments in bf16 enter the step through a root and a quotient, whose mean is biased by their variance, 1e-5.
    assert float(errors.detach().abs().max()) < 4.5
    if moments == BF16:
        for key, state in (("exp_avg", optimizer.state[many]), ("exp_avg_sq", optimizer.state[many])):
            reference = StochasticAdamW(
                [{"params": [copied := nn.Parameter(start.detach().double().float())]}], **OPTIONS
            )
            trained(copied, steps, reference)
            values = state[key].double()
            spread = values.std(0) / math.sqrt(runs)
            assert float(((values.mean(0) - reference.state[copied][key].double()) / spread).abs().max()) < 4.5


def test_fp32_parameters_take_torchs_steps() -> None:
    one, two = parameter(90, 70, dtype=FP32), parameter(90, 70, dtype=FP32)
    steps = gradients(one.shape, 20)
    trained(one, steps, StochasticAdamW([{"params": [one]}], **OPTIONS))
    trained(two, steps, torch.optim.AdamW([two], **OPTIONS))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_updates_far_below_an_ulp_add_up() -> None:
    # lr = 1e-5 at weights of 1, whose next number is 0.0078 away: 100 steps are to move them by 0.001.
    by_chance, nearest = nn.Parameter(torch.ones(20_000, dtype=BF16)), nn.Parameter(torch.ones(20_000, dtype=BF16))
    steps = [torch.ones(20_000, dtype=BF16)] * 100
    trained(by_chance, steps, StochasticAdamW([{"params": [by_chance]}], lr=1e-5, weight_decay=0.0, moments=BF16))
    trained(nearest, steps, torch.optim.AdamW([nearest], lr=1e-5, weight_decay=0.0))
    assert bool((nearest == 1).all())
    moved = 1 - by_chance.detach().double()
    assert float(moved.mean()) == pytest.approx(1e-3, rel=0.1)


def test_the_second_moment_decays() -> None:
    weight = nn.Parameter(torch.zeros(20_000, dtype=BF16))
    optimizer = StochasticAdamW([{"params": [weight]}], lr=0.0, moments=BF16)
    weight.grad = torch.full_like(weight, math.sqrt(1000.0))
    optimizer.step()
    begin = optimizer.state[weight]["exp_avg_sq"].double().mean()
    nearest = optimizer.state[weight]["exp_avg_sq"].clone()
    weight.grad = torch.zeros_like(weight)
    for _ in range(300):
        optimizer.step()
        nearest = (nearest.float() * 0.999).to(BF16)
    assert float(nearest.double().mean() / begin) == pytest.approx(1.0, abs=0.01)
    assert float(optimizer.state[weight]["exp_avg_sq"].double().mean() / begin) == pytest.approx(0.999**300, rel=0.01)


@pytest.mark.parametrize("moments", [BF16, FP32])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_run_that_goes_on_is_the_one_that_was_not_cut_off(moments: torch.dtype, dtype: torch.dtype) -> None:
    def built(weights: list[nn.Parameter], seed: int) -> StochasticAdamW:
        groups: list[dict[str, Any]] = [{"params": weights[:1]}, {"params": weights[1:], "lr": 1e-2}]
        return StochasticAdamW(groups, moments=moments, seed=seed, **OPTIONS)

    def run(weights: list[nn.Parameter], optimizer: StochasticAdamW, parts: range) -> None:
        for part in parts:
            for number, weight in enumerate(weights):
                if number == part % 3:
                    weight.grad = None  # and is left out, as torch leaves it out
                    continue
                weight.grad = gradients(weight.shape, part + 1)[-1].to(weight.dtype)
            optimizer.step()

    straight = [parameter(70, 80, dtype=dtype), parameter(30, dtype=FP32), parameter(5000, dtype=dtype)]
    halves = [copy.deepcopy(weight) for weight in straight]
    run(straight, whole := built(straight, 5), range(8))
    run(halves, first := built(halves, 5), range(4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = built(halves, 99)  # the seed is the checkpoint's
    second.load_state_dict(torch.load(file, weights_only=True))
    run(halves, second, range(4, 8))
    assert all(torch.equal(one, two) for one, two in zip(straight, halves, strict=True))
    for one, two in zip(straight, halves, strict=True):
        for key, value in whole.state[one].items():
            assert value.dtype == second.state[two][key].dtype and torch.equal(value, second.state[two][key])


def test_another_seed_rounds_otherwise_and_parameters_round_apart() -> None:
    def once(seed: int) -> tuple[Tensor, Tensor]:
        weights = [parameter(5000), parameter(5000)]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        StochasticAdamW([{"params": weights}], seed=seed, **OPTIONS).step()
        return weights[0].detach(), weights[1].detach()

    (a, b), (c, d), (e, _) = once(0), once(0), once(1)
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, b) and not torch.equal(a, e)


def test_strides_and_nothing_at_all() -> None:
    start = parameter(60, 90)
    across = nn.Parameter(start.detach().t().contiguous().t())
    assert not across.is_contiguous()
    steps = gradients(start.shape, 3)
    trained(start, steps, StochasticAdamW([{"params": [start]}], moments=BF16, **OPTIONS))
    trained(across, steps, StochasticAdamW([{"params": [across]}], moments=BF16, **OPTIONS))
    assert torch.equal(start, across) and not across.is_contiguous()
    empty = nn.Parameter(torch.zeros(0, 4, dtype=BF16))
    trained(empty, gradients(empty.shape, 1), StochasticAdamW([{"params": [empty]}], moments=BF16, **OPTIONS))


def test_which_optimizer_updates_what() -> None:
    def built(name: str, *dtypes: torch.dtype) -> torch.optim.Optimizer:
        groups = [{"params": [parameter(8, 8, dtype=dtype) for dtype in dtypes]}]
        return build_optimizer(groups, OptimizerSection.model_validate({"name": name}), seed=3)

    assert type(built("adamw", FP32)) is torch.optim.AdamW
    for name, dtypes, moments in (("adamw", (BF16, FP32), FP32), ("adamw_16bit", (FP32,), BF16)):
        optimizer = built(name, *dtypes)
        assert isinstance(optimizer, StochasticAdamW)
        assert optimizer.moments == moments and optimizer.param_groups[0]["seed"] == 3
    for name in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"):
        with pytest.raises(ConfigError, match="adamw_16bit"):
            built(name, BF16)


@pytest.mark.parametrize(("name", "each"), [("adamw", 8), ("adamw_16bit", 4)])
def test_moments_take_the_bytes_that_are_announced(name: str, each: int) -> None:
    section = OptimizerSection.model_validate({"name": name})
    weights = [parameter(70, 80), parameter(64, dtype=FP32)]
    optimizer = build_optimizer([{"params": weights}], section)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = sum(state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert held == each * 5600 + 8 * 64 == state_bytes(weights, section)


def weights_and_gradients() -> list[nn.Parameter]:
    found = [parameter(70, 80), parameter(90, 60, dtype=FP32, seed=1), parameter(64, dtype=FP32, seed=2), parameter(5)]
    for weight in found[:3]:
        weight.grad = gradients(weight.shape, 1)[0].to(weight.dtype)
    return found


@pytest.mark.parametrize("moments", [BF16, FP32])
@pytest.mark.parametrize("through_closure", [False, True])
def test_a_factor_is_that_of_the_next_step_alone(moments: torch.dtype, through_closure: bool) -> None:
    """Bit for bit in fp32, and as for a gradient in fp32 where it is in bf16: nothing is rounded before the step."""
    factor = torch.tensor(0.3171)
    ours, exact = weights_and_gradients(), weights_and_gradients()
    optimizer, expected = (
        StochasticAdamW([{"params": weights}], moments=moments, seed=4, **OPTIONS) for weights in (ours, exact)
    )
    held = [None if weight.grad is None else weight.grad.clone() for weight in ours]
    for number in range(3):
        if number != 1:
            for weight, gradient in zip(exact, held, strict=True):
                if gradient is not None and weight.dtype == FP32:
                    weight.grad = gradient * factor
        closure = None
        if number != 1 and through_closure:
            closure = partial(setattr, optimizer, "gradient_factor", factor)  # as Lightning does
        elif number != 1:
            optimizer.gradient_factor = factor
        optimizer.step(closure)
        expected.step()
        assert optimizer.gradient_factor is None
        for weight, gradient in zip(exact, held, strict=True):
            weight.grad = gradient
    for one, other, gradient in zip(ours, exact, held, strict=True):
        assert one.grad is gradient is None or (gradient is not None and torch.equal(one.grad, gradient))  # type: ignore[arg-type]
        if one.dtype == FP32:
            assert torch.equal(one, other)
            assert all(
                torch.equal(optimizer.state[one][key], expected.state[other][key]) for key in optimizer.state[one]
            )
    first = optimizer.state[ours[0]]["exp_avg"].double()
    assert held[0] is not None
    b = OPTIONS["betas"][0]
    wanted = held[0].double() * (1 - b) * (float(factor) * (b**2 + 1) + b)
    torch.testing.assert_close(first, wanted, rtol=3 * 2**-7 if moments == BF16 else 1e-5, atol=1e-7)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_by_norm_is_torchs(limit: float, tiny_llama_dir: Path) -> None:
    words = f"model.path={tiny_llama_dir}", "method.base=none", "trainer.accelerator=cpu"
    module = LanguageModule(load_recipe(None, *words))
    ours, exact = weights_and_gradients(), weights_and_gradients()
    optimizer = StochasticAdamW([{"params": ours[:1]}, {"params": ours[1:]}], **OPTIONS)
    wide = [nn.Parameter(weight.detach().double()) for weight in exact]
    for double, weight in zip(wide, exact, strict=True):
        double.grad = None if weight.grad is None else weight.grad.double()
    norm = torch.nn.utils.clip_grad_norm_(wide, limit)
    module.configure_gradient_clipping(optimizer, limit, "norm")
    factor = optimizer.gradient_factor
    assert factor is not None and factor.dtype == FP32 and factor.shape == ()
    # Not rounded to bf16 on the way, as torch's own norm of these would be.
    assert float(factor) == pytest.approx(min(1.0, limit / (float(norm) + 1e-6)), rel=1e-6)
    for mine, double in zip(ours, wide, strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad.double() * factor, double.grad, rtol=1e-6, atol=0)

    torchs = torch.optim.AdamW(exact, lr=1e-3)
    reference = weights_and_gradients()
    module.configure_gradient_clipping(torchs, limit, "norm")
    torch.nn.utils.clip_grad_norm_(reference, limit)
    pairs = [(x.grad, y.grad) for x, y in zip(exact, reference, strict=True) if x.grad is not None]
    assert len(pairs) == 3 and all(torch.equal(*pair) for pair in pairs)  # type: ignore[arg-type]
    assert not hasattr(torchs, "gradient_factor")


def test_other_clipping_and_nothing_to_clip_leave_no_factor(tiny_llama_dir: Path) -> None:
    words = f"model.path={tiny_llama_dir}", "method.base=none", "trainer.accelerator=cpu"
    module = LanguageModule(load_recipe(None, *words))
    weights = weights_and_gradients()
    optimizer = StochasticAdamW([{"params": weights}], **OPTIONS)
    module.configure_gradient_clipping(optimizer, None, "norm")
    module.configure_gradient_clipping(optimizer, 0.25, "value")
    assert optimizer.gradient_factor is None
    assert all(float(weight.grad.abs().max()) == 0.25 for weight in weights if weight.grad is not None)
    optimizer.zero_grad()
    module.configure_gradient_clipping(optimizer, 0.25, "norm")
    assert optimizer.gradient_factor is None
    optimizer.step()
