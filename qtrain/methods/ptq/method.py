"""Post-training quantization: packed integers, as the starting point chose them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from qtrain.errors import ConfigError
from qtrain.methods.method import Context, Progress
from qtrain.methods.packed.method import PackedMethod
from qtrain.methods.ptq.config import PtqOptions
from qtrain.modules.calibrate import calibrate


class Ptq(PackedMethod[PtqOptions]):
    """y = fq(x) ((q - z) s)^T, chosen by ``init`` and left so: a baseline, or an export without a training."""

    artifact: ClassVar[str] = "base"

    def calibrate(self, model: nn.Module, rows: Sequence[Tensor], context: Context, progress: Progress) -> None:
        """Observe what static ranges of inputs have to hold."""
        plain, device = self.plain_model(model), next(model.parameters()).device
        calibrate(model, rows, lambda ids: self.run(plain, ids.to(device), context))

    def parameter_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """None.

        Raises:
            ConfigError: always; `qtrain quantize` needs no optimizer.
        """
        raise ConfigError(
            "method.name=ptq trains nothing",
            fix="qtrain quantize, or method.name=peqa to train the scales",
        )

    def save(self, model: nn.Module, directory: Path) -> None:
        """The packed model is all there is: RUN/base, which ``save_base`` wrote."""

    def restore(self, model: nn.Module, directory: Path) -> None:
        """Nothing beside the base."""
