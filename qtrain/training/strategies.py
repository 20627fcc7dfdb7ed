"""What of a config the trainer's strategy can serve."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from qtrain.callbacks.gradient_compression import check_strategy
from qtrain.config.schema import Config
from qtrain.errors import ConfigError
from qtrain.models.dtype import resolve_dtypes
from qtrain.modules.schedule import QuantizationSchedule
from qtrain.training.optimizers import check_rounding
from qtrain.training.sharding import ShardedStrategy


def check_served(trainer: L.Trainer, config: Config, schedule: QuantizationSchedule) -> None:
    """Raise where the strategy would fail in the middle, or train something else.

    Raises:
        ConfigError: with the way out.
    """
    strategy = trainer.strategy
    if getattr(config.method, "weight_storage", "fp32") == "bf16":
        _check_bf16(config, strategy.root_device)
    if config.run.gradient_compression != "none":
        check_strategy(trainer, config.run.gradient_compression)
    if config.run.cuda_graphs:
        _check_graphs(trainer, config, schedule)
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)) or type(strategy) is ModelParallelStrategy:
        raise ConfigError(
            f"trainer.strategy is {type(strategy).__name__}",
            rule="weights are sharded by FSDP2",
            fix="trainer.strategy=fsdp2",
        )
    if isinstance(strategy, ShardedStrategy):
        _check_sharded(config, schedule)
    elif isinstance(strategy, DDPStrategy) and schedule.moves and not _looks_for_unused(strategy):
        raise ConfigError(
            "quantization moves during training, under DDP that waits for every gradient",
            rule="ranges have no gradient before quantization begins, nor once they are frozen",
            fix="trainer.strategy=ddp_find_unused_parameters_true",
        )


def _check_bf16(config: Config, device: torch.device) -> None:
    """Weights in bf16 are multiplied in bf16, and updated by who rounds them by chance."""
    check_rounding(config.optimizer, in_bf16=True)
    _, compute = resolve_dtypes(config.model.dtype, config.method.compute_dtype, device)
    for fact, rule, fix in (
        (
            compute != torch.bfloat16 and f"products in fp32 on {device.type}",
            "weights kept in bf16 are multiplied in bf16",
            "method.weight_storage=fp32, or method.compute_dtype=bf16",
        ),
        (
            config.distill.layerwise is not None and "distill.layerwise",
            "blocks are distilled with weights in fp32",
            "method.weight_storage=fp32",
        ),
    ):
        if fact:
            raise ConfigError(f"weights in bf16 with {fact}", where="method.weight_storage=bf16", rule=rule, fix=fix)


def _check_sharded(config: Config, schedule: QuantizationSchedule) -> None:
    for fact, fix in (
        (config.optimizer.name != "adamw" and f"optimizer.name={config.optimizer.name}", "optimizer.name=adamw"),
        (getattr(config.method, "base", None) == "int8" and "method.base=int8", "method.base=nf4"),
        (
            getattr(config.method, "weight_storage", "fp32") == "bf16" and "method.weight_storage=bf16",
            "trainer.strategy=ddp",
        ),
        (schedule.moves and "quantization that moves during training", "trainer.strategy=ddp"),
    ):
        if fact:
            raise ConfigError(f"{fact} over shares of weights", where="trainer.strategy=fsdp2", fix=fix)


def _check_graphs(trainer: L.Trainer, config: Config, schedule: QuantizationSchedule) -> None:
    for fact, fix in (
        (config.method.name != "qat" and f"method.name={config.method.name}", "run.cuda_graphs=false"),
        (getattr(config.method, "lora", None) is not None and "method.lora", "run.cuda_graphs=false"),
        (schedule.moves and "quantization that moves during training", "method.start_step=0, no bits_schedule"),
        (trainer.world_size > 1 and f"{trainer.world_size} processes", "trainer.devices=1"),
        (
            config.run.recompute not in ("none", "auto") and f"run.recompute={config.run.recompute}",
            "run.recompute=none",
        ),
    ):
        if fact:
            rule = "a graph repeats the kernels of the first step, in one process, with what they saved"
            raise ConfigError(f"CUDA graphs of layers with {fact}", where="run.cuda_graphs=true", rule=rule, fix=fix)


def _looks_for_unused(strategy: DDPStrategy) -> bool:
    return bool(strategy._ddp_kwargs.get("find_unused_parameters"))
