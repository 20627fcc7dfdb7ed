"""Optimizers by name, and the course of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.optim import optimizer as upstream
from hypothesis import given
from hypothesis import strategies as st

from qtrain.config.schema import OptimizerSection
from qtrain.errors import ConfigError
from qtrain.kernels import adamw8
from qtrain.training import bnb_optimizers
from qtrain.training.optimizers import build_optimizer, build_schedule, lr_factor, state_bytes


def factors(total: float, steps: int, **keys: Any) -> list[float]:
    section = OptimizerSection(**keys)
    return [lr_factor(step, section, total) for step in range(steps)]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [1.0] * 8),
        ({"warmup": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"warmup": 0.5}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),  # a share of 8 steps
        ({"schedule": "linear"}, [1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"schedule": "linear", "warmup": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]),
        (
            {"schedule": "cosine", "warmup": 2},
            [0.5, 1.0, *((1 + math.cos(math.pi * step / 6)) / 2 for step in range(6))],
        ),
    ],
)
def test_the_course_of_eight_steps(keys: dict[str, Any], expected: list[float]) -> None:
    assert factors(8, 8, **keys) == pytest.approx(expected)


def test_a_broken_number_of_steps_is_rounded_up() -> None:
    # 1.5 steps: at the second the rate must not be 2 / 1.5 of its highest
    assert factors(3, 3, warmup=0.5) == factors(3, 3, warmup=1.5) == [0.5, 1.0, 1.0]


def test_a_share_below_one_step_is_no_warm_up() -> None:
    assert factors(10, 3, warmup=0.05) == [1.0, 1.0, 1.0]


def test_after_the_last_step_nothing_is_left_and_nothing_grows() -> None:
    for schedule in ("linear", "cosine"):
        assert factors(8, 12, schedule=schedule)[8:] == pytest.approx([0.0] * 4)


def test_without_a_known_end_nothing_may_depend_on_it() -> None:
    for keys in ({"schedule": "cosine"}, {"schedule": "linear", "warmup": 3}, {"warmup": 0.1}):
        with pytest.raises(ConfigError, match=r"trainer\.max_steps=N"):
            build_schedule(build_optimizer(parameters(), OptimizerSection()), OptimizerSection(**keys), math.inf)
    schedule = build_schedule(build_optimizer(parameters(), OptimizerSection()), OptimizerSection(warmup=2), math.inf)
    assert schedule.get_last_lr() == [1e-4]
    assert factors(math.inf, 4, warmup=2) == [0.5, 1.0, 1.0, 1.0]


@given(
    total=st.integers(1, 500),
    warmup=st.one_of(st.just(0.0), st.floats(0.01, 0.9), st.integers(1, 600).map(float)),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_it_rises_once_falls_once_and_stays_within_bounds(total: int, warmup: float, schedule: str) -> None:
    course = factors(total, total, warmup=warmup, schedule=schedule)
    top = course.index(max(course))
    assert all(0 < factor <= 1 for factor in course)
    assert course[: top + 1] == sorted(course[: top + 1])
    assert course[top:] == sorted(course[top:], reverse=True)


def parameters(device: str = "cpu") -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [{"params": [torch.nn.Parameter(torch.randn(64, 64, device=device))]}]


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("adamw", torch.optim.AdamW),
        ("adamw_8bit", bnb.optim.AdamW8bit),
        ("paged_adamw_8bit", bnb.optim.PagedAdamW8bit),
        ("paged_adamw_32bit", bnb.optim.PagedAdamW32bit),
    ],
)
def test_optimizers_by_name(name: str, cls: type) -> None:
    section = OptimizerSection.model_validate(
        {"name": name, "lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    )
    optimizer = build_optimizer(parameters(), section)
    assert isinstance(optimizer, cls)
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in ("lr", "weight_decay", "eps")} == {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-6}
    assert tuple(group["betas"]) == (0.8, 0.95)


def test_a_step_of_adamw_is_the_one_of_the_paper() -> None:
    groups = parameters()
    weight = groups[0]["params"][0]
    before = weight.detach().clone()
    optimizer = build_optimizer(groups, OptimizerSection(lr=1e-2, weight_decay=0.1))
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    # The first step moves by lr in the gradient's direction; the decay is decoupled.
    torch.testing.assert_close(weight.detach(), before * (1 - 1e-3) - 1e-2 * weight.grad.sign(), rtol=1e-4, atol=1e-6)


def test_states_in_eight_bits() -> None:
    def stored(name: str) -> int:
        groups = parameters()
        optimizer = build_optimizer(groups, OptimizerSection.model_validate({"name": name}))
        weight = groups[0]["params"][0]
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        return sum(
            v.numel() * v.element_size() for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor)
        )

    assert stored("adamw") >= 2 * 4 * 64 * 64
    # two codes a parameter, two scales a block of 256, and the two codebooks of 256 values
    assert stored("adamw_8bit") == 2 * (64 * 64 + 4 * 64 * 64 // 256 + 4 * 256)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize(
    ("name", "cls"), [("adamw_8bit", bnb.optim.AdamW8bit), ("paged_adamw_8bit", bnb.optim.PagedAdamW8bit)]
)
def test_bitsandbytes_steps_without_a_wait_after_each_parameter(
    name: str, cls: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[torch.Tensor] = []
    monkeypatch.setattr(upstream, "sync_gpu", waited.append)
    section = OptimizerSection.model_validate({"name": name, "lr": 1e-2})
    ours, theirs = parameters(), parameters()
    optimizer = build_optimizer(ours, section)
    judge = cls(theirs, lr=1e-2, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay)
    for step in range(3):
        for groups in (ours, theirs):
            groups[0]["params"][0].grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        assert optimizer.step(lambda: "closure") == "closure"
        assert not waited
        judge.step()
        assert waited  # theirs does, and does again: nothing stays patched
        waited.clear()
    assert torch.equal(ours[0]["params"][0], theirs[0]["params"][0])


def test_a_detour_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(adamw8, "has_kernel", lambda: False)
    assert "Triton is not installed" in bnb_optimizers.detour_words("paged_adamw_8bit", gpu)
    assert bnb_optimizers.detour_words("paged_adamw_8bit", cpu) == bnb_optimizers.detour_words("adamw", gpu) == ""
    monkeypatch.setattr(adamw8, "has_kernel", lambda: True)
    assert bnb_optimizers.detour_words("adamw_8bit", gpu) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("roomy", [True, False])
@pytest.mark.parametrize("aside", [False, True], ids=["default stream", "another stream"])
def test_on_a_gpu_one_launch_takes_the_steps_of_bitsandbytes(
    name: str, roomy: bool, aside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bnb_optimizers, "ROOM", -1.0 if roomy else 2.0)
    launched: list[int] = []
    launch = adamw8.adamw8_tiles.adamw8_

    def noted(table: Any, gradients: list[int], *others: Any) -> None:
        launched.append(len(gradients))
        launch(table, gradients, *others)

    monkeypatch.setattr(adamw8.adamw8_tiles, "adamw8_", noted)
    section = OptimizerSection.model_validate({"name": name, "lr": 1e-2, "weight_decay": 0.1})
    shapes = ((512, 512), (70, 100), (300,), (4097,))

    def made() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]

    ours, theirs = made(), made()
    optimizer = build_optimizer([{"params": ours}], section)
    cls = {"adamw_8bit": bnb.optim.AdamW8bit, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}[name]
    judge = cls(theirs, lr=1e-2, betas=section.betas, eps=section.eps, weight_decay=0.1)
    for step in range(4):
        for parameter, twin in zip(ours, theirs, strict=True):
            torch.manual_seed(step)
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream() if aside else torch.cuda.default_stream()):
            optimizer.step()
        torch.cuda.synchronize()
        judge.step()
        for index, (parameter, twin) in enumerate(zip(ours, theirs, strict=True)):
            apart = (parameter - twin).abs()
            # The first step is from the same state; then a few codes are one off.
            if step == 0 or index == 2:
                torch.testing.assert_close(parameter, twin, rtol=1e-5, atol=1e-6)
            assert apart.max() < 1e-2 and apart.mean() < 1e-5
    assert launched == [3] * 4
    states = optimizer.state_dict()["state"], judge.state_dict()["state"]
    assert [state["step"] for state in states[0].values()] == [state["step"] for state in states[1].values()] == [4] * 4
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert one.keys() == other.keys()


def test_groups_keep_their_own_rates_under_one_schedule() -> None:
    groups = [{**parameters()[0], "lr": 1e-3}, {**parameters()[0], "lr": 16e-3}]
    section = OptimizerSection(lr=1e-3, schedule="linear", warmup=2)
    optimizer = build_optimizer(groups, section)
    schedule = build_schedule(optimizer, section, 6)
    seen = []
    for _ in range(6):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert [rates[0] for rates in seen] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert all(b == pytest.approx(16 * a) for a, b in seen)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_the_state_is_as_large_as_it_is_said_to_be(name: str) -> None:
    section = OptimizerSection.model_validate({"name": name})
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((70, 100), (300,), (4096,))]
    optimizer = build_optimizer([{"params": parameters}], section)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    shared = {"step", "qmap1", "qmap2"}  # of all tensors together, 2 kB
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in shared
    )
    assert held == state_bytes(parameters, section)
