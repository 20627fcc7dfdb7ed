"""A plain image classifier, as anybody would write it: what makes it low-bit comes from a callback."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR


class ImageClassifier(L.LightningModule):
    """Trains ``model`` on cross-entropy by SGD, lr along a cosine to 0 over all steps.

    Logs ``train/loss``, ``train/lr`` and, over the whole split, ``loss`` and ``accuracy`` of ``val/`` and ``test/``.

    Args:
        model: images [N, C, H, W] → logits [N, classes].
        lr: learning rate of the first step.
        momentum: Nesterov's.
        weight_decay: L2 penalty on all parameters.
    """

    def __init__(self, model: nn.Module, *, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 5e-4) -> None:
        super().__init__()
        self.model = model
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.model(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of ``batch["image"]`` against ``batch["label"]`` [N], in nats."""
        loss = functional.cross_entropy(self(batch["image"]), batch["label"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the rate of this step."""
        # A tensor: a plain number would be copied to the device, and the step would wait for that.
        self.log("train/lr", torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"]))

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add one batch to the means over the split."""
        self._measure("val", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """As for validation."""
        self._measure("test", batch)

    def _measure(self, split: str, batch: Mapping[str, Tensor]) -> None:
        logits, labels = self(batch["image"]), batch["label"]
        found = {
            f"{split}/loss": functional.cross_entropy(logits, labels),
            f"{split}/accuracy": (logits.argmax(1) == labels).float().mean(),
        }
        self.log_dict(found, on_epoch=True, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD on all parameters that there are when training begins."""
        optimizer = torch.optim.SGD(
            self.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=True
        )
        schedule = CosineAnnealingLR(optimizer, T_max=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
