"""Optimizers and schedules by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qtrain.config.schema import OptimizerSection
from qtrain.errors import ConfigError
from qtrain.kernels.adamw import CHUNK, CHUNK_BYTES
from qtrain.training.bnb_optimizers import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from qtrain.training.stochastic_adamw import SMALLEST_16BIT, StochasticAdamW

SMALLEST_8BIT = 4096
EIGHT_BIT = {
    "adamw_8bit": AdamW8bit,
    "paged_adamw_8bit": PagedAdamW8bit,
    "paged_adamw_32bit": PagedAdamW32bit,
}


def build_optimizer(groups: list[dict[str, Any]], section: OptimizerSection, seed: int = 0) -> Optimizer:
    """AdamW over ``groups``; 8-bit states in blocks of 256 (Dettmers 2021, arXiv 2110.02861), paged ones on demand.

    Args:
        seed: of stochastic rounding.

    Raises:
        ConfigError: weights in bf16 for an optimizer that rounds them to nearest.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    arguments: dict[str, Any] = {
        "lr": section.lr,
        "betas": section.betas,
        "eps": section.eps,
        "weight_decay": section.weight_decay,
    }
    if rounds_by_chance(parameters, section):
        moments = torch.bfloat16 if section.name == "adamw_16bit" else torch.float32
        return StochasticAdamW(groups, moments=moments, seed=seed, **arguments)
    if section.name == "adamw":
        on_gpu = all(p.device.type == "cuda" for p in parameters)
        return torch.optim.AdamW(groups, fused=on_gpu, **arguments)
    check_rounding(section, in_bf16=any(parameter.dtype == torch.bfloat16 for parameter in parameters))
    optimizer: Optimizer = EIGHT_BIT[section.name](groups, **arguments)
    return optimizer


def rounds_by_chance(parameters: Iterable[Tensor], section: OptimizerSection) -> bool:
    """Whether anything in bf16 is updated: what ``StochasticAdamW`` is for."""
    in_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    return section.name == "adamw_16bit" or (section.name == "adamw" and in_bf16)


def check_rounding(section: OptimizerSection, *, in_bf16: bool) -> None:
    """Raise where updates of weights in bf16 would be lost.

    Raises:
        ConfigError: with the way out.
    """
    if in_bf16 and section.name in EIGHT_BIT:
        raise ConfigError(
            f"optimizer.name={section.name} rounds weights in bf16 to the nearest number",
            rule="an update below 0.2 % of a weight is lost then; rounded by chance it counts on average",
            fix="optimizer.name=adamw_16bit (or adamw, with moments in fp32), or method.weight_storage=fp32",
        )


def update_bytes(parameters: Iterable[Tensor], section: OptimizerSection, *, on_gpu: bool) -> int:
    """Bytes that come and go while parameters are updated."""
    parameters = list(parameters)
    largest = max(parameters, key=Tensor.numel, default=None)
    if largest is None or on_gpu:
        return 0  # one kernel does it
    if rounds_by_chance(parameters, section):
        return CHUNK_BYTES * min(CHUNK, largest.numel()) // CHUNK
    # torch's AdamW goes parameter by parameter on a CPU: a root and a quotient.
    return 2 * largest.nbytes if section.name == "adamw" else 0


def state_bytes(parameters: Iterable[Tensor], section: OptimizerSection) -> int:
    """Bytes of the two moments once they are there: 8 a parameter in 32 bits, 4 in 16; in 8 bits 2, and 8 a block of
    256. Those of less than 4096 elements are in 32 bits, for bitsandbytes too.
    """
    total = 0
    for parameter in parameters:
        count = parameter.numel()
        if section.name == "adamw_16bit":
            total += 8 * count if count < SMALLEST_16BIT else 4 * count
            continue
        small = "8bit" not in section.name or count < SMALLEST_8BIT
        total += 8 * count if small else 2 * count + 8 * math.ceil(count / 256)
    return total


def lr_factor(step: int, section: OptimizerSection, total: float) -> float:
    """Factor on lr at ``step`` of ``total``: linear warm-up over whole steps, then the schedule down to 0."""
    warmup = math.ceil(section.warmup if section.warmup >= 1 or not section.warmup else section.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if section.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    return 1 - progress if section.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(optimizer: Optimizer, section: OptimizerSection, total: float) -> LambdaLR:
    """``lr_factor`` as a scheduler that steps with the optimizer.

    Raises:
        ConfigError: ``total`` is infinite and the schedule or a share of warm-up depends on it.
    """
    if math.isinf(total) and (section.schedule != "constant" or 0 < section.warmup < 1):
        depends = f"schedule={section.schedule}" if section.schedule != "constant" else f"warmup={section.warmup}"
        raise ConfigError(
            f"optimizer.{depends} depends on the number of steps, which is not known here",
            rule="streams and trainer.max_time have no known end",
            fix="trainer.max_steps=N, or optimizer.schedule=constant with optimizer.warmup in whole steps",
        )
    return LambdaLR(optimizer, lambda step: lr_factor(step, section, total))
