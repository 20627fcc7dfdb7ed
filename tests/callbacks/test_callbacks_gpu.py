from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.callbacks.nan_guard import NanGuard
from qtrain.callbacks.throughput import Throughput
from qtrain.errors import ModelError
from qtrain.training.bnb_optimizers import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from qtrain.training.stochastic_adamw import StochasticAdamW

pytestmark = [
    pytest.mark.gpu,
    # A few rows in memory need no workers, and a short run logs less often than Lightning's default.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    # Lightning 2.6 on torch 2.13.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
]


class Wide(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1024, 8192), nn.ReLU(), nn.Linear(8192, 1024))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = (self.layers(batch["x"]) ** 2).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(path: Path, model: LightningModule, *callbacks: Any) -> None:
    batch = [{"x": torch.ones(1024), "tokens": torch.tensor(128)}] * 32
    trainer = Trainer(
        max_epochs=1,
        accelerator="gpu",
        devices=1,
        logger=CSVLogger(path),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(batch, batch_size=2))  # type: ignore[arg-type]


def test_memory_is_what_tensors_took(tmp_path: Path) -> None:
    callback = Throughput(every_n_steps=4, warmup_steps=2)
    fit(tmp_path, Wide(), callback, NanGuard())
    weights = 4 * 2 * 1024 * 8192 / 2**30
    # Weights and their gradients, and little else: the batch is small.
    assert callback.peak_gib is not None and 2 * weights <= callback.peak_gib < 2 * weights + 0.1
    assert callback.tokens_per_second is not None and callback.tokens_per_second > 0
    assert callback.mfu is None or 0 < callback.mfu < 1


def test_the_layer_is_named_on_a_device_that_runs_ahead(tmp_path: Path) -> None:
    model = Wide()
    with torch.no_grad():
        model.layers[2].weight.fill_(torch.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(ModelError, match=r"the loss is nan at step 0 .*: layers\.2 \(nan\), whose weight"):
        fit(tmp_path, model, NanGuard())


@pytest.mark.parametrize(
    "make",
    [partial(torch.optim.AdamW, fused=True), StochasticAdamW, AdamW8bit, PagedAdamW8bit, PagedAdamW32bit],
    ids=["fused", "by chance", "8-bit", "paged 8-bit", "paged"],
)
def test_a_step_is_left_out_on_the_device(make: Any, tmp_path: Path) -> None:
    """And seen a step later, when the weights are still those before it."""
    seen: list[Tensor] = []

    class Broken(Wide):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            x = batch["x"] * torch.nan if batch_idx == 5 else batch["x"]
            loss: Tensor = (self.layers(x) ** 2).mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer: torch.optim.Optimizer = make([{"params": list(self.parameters())}], lr=1e-3)
            return optimizer

        def on_train_batch_end(self, *_: object) -> None:
            seen.append(self.layers[0].weight.detach().clone())  # type: ignore[operator, union-attr, arg-type]

    model = Broken()
    with pytest.raises(ModelError, match=r"the loss is nan at step 5 \(epoch 0, batch 5\); .*: layers\.0 \(nan\)"):
        fit(tmp_path, model, NanGuard())
    assert len(seen) == 6 and torch.equal(seen[5], seen[4]) and not torch.equal(seen[4], seen[3])
    assert torch.equal(model.layers[0].weight.cpu(), seen[4].cpu())  # type: ignore[operator, union-attr, arg-type]
