"""What every fit gives `lightning.Trainer`, whatever it trains."""

from __future__ import annotations

import os
import sys
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar

from qtrain.callbacks.gradient_compression import GradientCompression
from qtrain.callbacks.nan_guard import NanGuard
from qtrain.callbacks.progress_lines import ProgressLines
from qtrain.callbacks.stop_signals import StopSignals
from qtrain.callbacks.trainable_checkpoint import TrainableCheckpoint
from qtrain.config.schema import Config, RunConfig
from qtrain.errors import ConfigError
from qtrain.models.dtype import resolve_dtypes
from qtrain.training.processes import started_by
from qtrain.training.run_directory import RunDirectory
from qtrain.training.sharding import ShardedStrategy


def trainer_arguments(config: RunConfig, **preferred: Any) -> dict[str, Any]:
    """What ``lightning.Trainer`` is given: ``trainer.*`` and what follows from other sections.

    Args:
        config: resolved.
        preferred: arguments for what ``trainer.*`` leaves open.

    Raises:
        ConfigError: ``trainer.precision`` contradicts ``method.compute_dtype``.
    """
    given = dict(config.trainer)
    accelerator = str(given.get("accelerator", "auto"))
    on_gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    storage = config.model.dtype if isinstance(config, Config) else "fp32"  # a network from scratch: fp32 weights
    _, compute = resolve_dtypes(storage, config.method.compute_dtype, torch.device("cuda" if on_gpu else "cpu"))
    precision = "bf16-mixed" if compute == torch.bfloat16 else "32-true"
    asked = given.pop("precision", None)
    if asked is not None and str(asked) not in (
        precision,
        precision.removesuffix("-true"),
        precision.removesuffix("-mixed"),
    ):
        raise ConfigError(
            f"trainer.precision={asked} contradicts products in {str(compute).removeprefix('torch.')}",
            rule="precision has one owner: method.compute_dtype (and model.dtype for storage)",
            fix=f"leave trainer.precision out; method.compute_dtype={'bf16' if 'bf16' in str(asked) else 'fp32'}",
        )
    if "max_steps" not in given and "max_epochs" not in given and "max_time" not in given:
        given["max_epochs"] = 1
    defaults = {
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": sys.stderr.isatty(),
        "use_distributed_sampler": False,  # the data modules take the rank's share themselves
    }
    if given.get("strategy") == "fsdp2":
        given["strategy"] = ShardedStrategy()
    started = started_by(os.environ)
    if started is not None:
        defaults |= {"devices": started[0], "num_nodes": started[1]}
    return {**defaults, **preferred, **given, "precision": precision}


def run_callbacks(config: RunConfig, run: RunDirectory) -> list[Callback]:
    """The callbacks of every run: a guard, checkpoints, an answer to signals, progress."""
    checkpoint = TrainableCheckpoint(
        str(run.checkpoints), every_n_train_steps=config.run.save_every, keep=config.run.keep
    )
    kind = config.run.gradient_compression
    return [
        NanGuard(),
        checkpoint,
        StopSignals(checkpoint),
        *([GradientCompression(kind)] if kind != "none" else []),
        RichProgressBar() if sys.stderr.isatty() else ProgressLines(),
    ]


def goal(trainer: L.Trainer) -> str:
    """Where training ends, in words."""
    return f"{trainer.max_steps} steps" if trainer.max_steps != -1 else f"{trainer.max_epochs} epochs"


def products(trainer: L.Trainer, compute: str = "auto") -> str:
    """What products run in, and where.

    Args:
        compute: ``method.compute_dtype``.
    """
    kind = "bf16" if "bf16" in str(trainer.precision) else "fp32"
    kind += ", of frozen weights in fp8," if compute == "fp8" else ""
    return f"products    {kind} on {device_name(trainer.strategy.root_device)}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU and its threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def finished(step: int | None, config: RunConfig, run: RunDirectory) -> bool:
    """Whether the checkpoint to go on from is the last step that was asked for."""
    limit = config.trainer.get("max_steps", -1)
    return step is not None and 0 < limit <= step and run.result("fit").exists()


def number(value: Any) -> float | None:
    """A logged metric as a number; None where nothing was logged."""
    return None if value is None else float(value)
