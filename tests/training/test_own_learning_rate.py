from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qtrain.errors import ModelError
from qtrain.training.own_learning_rate import OwnLearningRate

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01),
    "adam": lambda groups: torch.optim.Adam(groups),
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.5),
}


def trained(name: str, own: bool) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """20 steps with weight at 0.01 and bias at 0.003, warmed up and decayed; by a group of its own, or by the class."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    layer.double()  # so that only the rounding of fp64 is between the two ways
    if own:
        optimizer = OPTIMIZERS[name]([{"params": [layer.weight, layer.bias], "lr": 0.01}])
    else:
        optimizer = OPTIMIZERS[name]([{"params": [layer.weight], "lr": 0.01}, {"params": [layer.bias], "lr": 0.003}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5) * 0.95**step)
    rate = OwnLearningRate(optimizer, [layer.bias], 0.003) if own else None
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(torch.randn(8, 4, generator=generator, dtype=torch.float64)) ** 2).mean().backward()
        optimizer.step()
        schedule.step()
    if rate is not None:
        rate.remove()
    return layer, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_what_a_parameter_group_would_do(name: str) -> None:
    one, optimizer = trained(name, own=True)
    other, _ = trained(name, own=False)
    assert torch.allclose(one.weight, other.weight, rtol=1e-9, atol=0)
    assert torch.allclose(one.bias, other.bias, rtol=1e-9, atol=0)
    assert len(optimizer.param_groups) == 1
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_a_step_that_is_skipped_changes_nothing_and_no_gradient_means_no_update() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    OwnLearningRate(optimizer, [parameter], 0.001)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3))


def test_parameters_of_another_optimizer_are_none_of_its_business() -> None:
    mine, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([mine], lr=0.1)
    OwnLearningRate(optimizer, [other], 0.001)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_rate_of_zero_cannot_be_scaled() -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(ModelError, match="lr=0"):
        OwnLearningRate(torch.optim.SGD([parameter], lr=0.0), [parameter], 0.001)
