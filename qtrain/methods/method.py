"""What every method does: swap layers, say what trains, save it, and describe what is deployed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.errors import ExportError
from qtrain.methods.config import METHODS, MethodSection
from qtrain.methods.streamed import RunFiles, Streamed
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.schedule import QuantizationSchedule
from qtrain.registry import resolve

Options = TypeVar("Options", bound=MethodSection)
Progress = Callable[[Iterator[Any], int], Iterator[Any]]
Context = Callable[[], AbstractContextManager[Any]]
Text = Callable[[int], Sequence[Tensor]]
"""So many rows of training text as token ids [batch, tokens]."""


class Method(ABC, Generic[Options]):
    """A way to train a quantized model.

    Args:
        options: the ``method.*`` section.
    """

    artifact: ClassVar[str] = "adapter"
    """Folder of a run in which ``save`` leaves what was trained."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @property
    def keeps_base(self) -> bool:
        """Whether a run keeps the frozen part, packed, in RUN/base, and is loaded from there again."""
        return False

    @property
    def keeps_outputs(self) -> bool:
        """Whether layers keep their outputs for the backward, so that what reads those must not write over them."""
        return False

    @property
    def quantizes_alone(self) -> bool:
        """Whether ``prepare`` looks at the weights of one layer at a time, and at nothing that flows between them."""
        return False

    def quantized_alone(self, model: PreTrainedModel) -> Collection[str]:
        """Linear layers of ``model`` that ``prepare`` quantizes so: their weights may lie in files until then."""
        return ()

    @abstractmethod
    def prepare(
        self,
        model: PreTrainedModel,
        *,
        compute_dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        text: Text | None = None,
        scratch: Path | None = None,
        restoring: bool = False,
    ) -> nn.Module:
        """Swap layers of ``model`` and freeze what does not train; the result lies on ``device``.

        Args:
            text: of the training, for methods whose frozen part is chosen by what flows into the layers.
            scratch: directory from which a long preparation goes on when it was stopped.
            restoring: what was trained will be loaded over it, so nothing is searched for that is loaded as well.
        """

    @abstractmethod
    def parameter_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Groups for the optimizer: every trained parameter once."""

    @abstractmethod
    def save(self, model: nn.Module, directory: Path) -> None:
        """Write what was trained, in the layout of the field's own tool."""

    @abstractmethod
    def restore(self, model: nn.Module, directory: Path) -> None:
        """Read what ``save`` wrote into a prepared model."""

    @abstractmethod
    def plain_model(self, model: nn.Module) -> PreTrainedModel:
        """The transformers model inside: its decoder and head compute the loss."""

    @abstractmethod
    def deployed(
        self, model: nn.Module, *, dtype: torch.dtype, base: Mapping[str, torch.Tensor] | None = None
    ) -> DeployedModel:
        """The trained model as a plain checkpoint.

        Args:
            dtype: of the tensors that stay unquantized.
            base: merge into these weights, by their names, instead of the base that was trained on.
        """

    def streamed(self, files: RunFiles) -> Streamed | None:
        """The same model from the files of its run, a layer at a time; None where that cannot be."""
        return None

    def why_no_original(self) -> str | None:
        """Why what was trained cannot be merged into the weights of ``model.path``; None where it can."""
        return f"export.base=original merges an adapter, and method.name={self.options.name} has none"

    def check_original(self) -> None:
        """Raise where it cannot.

        Raises:
            ExportError: with the reason.
        """
        if reason := self.why_no_original():
            raise ExportError(reason, where="export.base=original", fix="leave export.base out")

    def fuse(self, model: nn.Module, context: Context) -> str | None:
        """Let blocks of layers run as one function in training, in place; what was done, in words, or None.

        Args:
            context: what forward passes run in, such as the training's autocast.
        """
        return None

    def serve(self, model: nn.Module, exported: PreTrainedModel) -> None:
        """Switch on in a loaded export what its consumer does by a run-time flag: no checkpoint holds it."""

    def calibrate(self, model: nn.Module, rows: Sequence[Tensor], context: Context, progress: Progress) -> None:
        """Find what the quantizers need to know of real text, once, before the training.

        Args:
            rows: token ids [batch, tokens] of the training data, ``options.calibration_rows`` of them.
            context: what forward passes run in, such as the training's autocast.
        """

    @property
    def schedule(self) -> QuantizationSchedule:
        """When quantization begins, how many bits it has by then, and when learned ranges stay."""
        return QuantizationSchedule()

    def baselines(self, model: nn.Module) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """What the training is measured against, by name: each, entered, makes ``model`` that for a while."""
        return {}

    def drop_baselines(self) -> None:
        """Let go of what only ``baselines`` needs: they have been measured."""

    def lines(self, model: nn.Module) -> list[str]:
        """What was done, a fact a line, for the terminal."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return [f"trained     {trained:,} parameters"]


def build_method(options: MethodSection) -> Method[Any]:
    """The method that ``method.name`` names."""
    METHODS.get(options.name)
    method: Method[Any] = resolve(options.implementation)(options)
    return method
