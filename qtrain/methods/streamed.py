"""A trained model whose numbers stay in the files of its run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qtrain.models.config import ModelSection
from qtrain.modules.deployed import DeployedModel


@dataclass(frozen=True)
class RunFiles:
    """Where a finished run's numbers lie, and what they are computed in.

    Attributes:
        model: the section that names the base.
        packed: RUN/base, of methods that keep one.
        trained: what ``Method.save`` wrote.
        storage: dtype of what is not quantized.
        compute: dtype of the products.
        device: that a layer is computed on.
        original: adapters are merged into the weights of ``model`` in place of the base that they were trained on.
    """

    model: ModelSection
    packed: Path | None
    trained: Path
    storage: torch.dtype
    compute: torch.dtype
    device: torch.device
    original: bool = False


@dataclass(frozen=True)
class Streamed:
    """The model of a run, of which one layer at a time is in memory.

    Attributes:
        model: as it trains, on the meta device: names, shapes and specs.
        deployed: as ``Method.deployed``, given the dtype of what stays unquantized.
    """

    model: nn.Module
    deployed: Callable[[torch.dtype], DeployedModel]
