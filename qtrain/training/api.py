"""The library in three calls: prepare a model, fit a config, export a run."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from qtrain.config.problems import problems
from qtrain.config.schema import Config, RunConfig
from qtrain.errors import ErrorList
from qtrain.methods.config import METHODS
from qtrain.methods.method import build_method
from qtrain.models.dtype import resolve_dtypes
from qtrain.registry import resolve
from qtrain.training.export_run import export_run as export_into
from qtrain.training.run_directory import RunDirectory


def prepare(
    model: PreTrainedModel, method: str = "qlora", *, device: torch.device | str | None = None, **options: Any
) -> nn.Module:
    """Quantize ``model`` and add what trains, for your own LightningModule or loop.

    The result is in training mode. Call it in ``configure_model`` (under FSDP2 between the build and
    ``fully_shard``), before optimizers are made.

    Args:
        model: of transformers, on any device; it is changed.
        method: a name of ``qtrain.METHODS``.
        device: where the result lies; default: where the model is.
        options: the method's keys: ``base="nf4", r=16, target_modules=["q_proj", "v_proj"]``.

    Raises:
        ErrorList: unknown keys or wrong values.
        ModelError: ``target_modules`` that match nothing.
    """
    cls = METHODS.get(method)
    try:
        section = cls.model_validate({"name": method, **options})
    except ValidationError as error:
        raise ErrorList(problems("method", cls, error)) from None
    target = torch.device(device) if device is not None else model.device
    _, compute = resolve_dtypes("auto", section.compute_dtype, target)
    # A loaded model is in eval mode, and Lightning leaves it there: no dropout, no recomputation.
    return build_method(section).prepare(model, compute_dtype=compute, device=target).train()


def fit(config: RunConfig) -> dict[str, Any]:
    """Train as ``qtrain fit`` does; the figures of fit.json."""
    figures: dict[str, Any] = resolve(config.implementation)(config, RunDirectory.of(config))
    return figures


def export_run(config: Config) -> dict[str, Any]:
    """Export the run of ``config`` as ``qtrain export`` does; the facts of export.json."""
    return export_into(config, RunDirectory.of(config))
