"""What waits until training has really begun."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class AtFirstBatch(Callback):
    """Calls ``function`` once, on rank 0, before the first batch of a fit: all that a checkpoint restores fits by then.

    A run that goes on with other keys must not have them in its config before its checkpoint has taken them: its
    export would read a config that does not fit what was trained.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self._function: Callable[[], object] | None = function

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The call."""
        function, self._function = self._function, None
        if function is not None and trainer.is_global_zero:
            function()
