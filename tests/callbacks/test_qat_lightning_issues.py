"""What Lightning's own QuantizationAwareTraining was removed for (Lightning #16750), as test cases.

It patched ``forward``, fused and converted modules in place when the fit ended, and kept objects in checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qtrain.callbacks.quantization_aware_training import QuantizationAwareTraining
from qtrain.modules.quant_conv import QuantConv2d
from qtrain.modules.quant_linear import QuantLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
]


class Images(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor, *, scale: float = 1.0, **unused: Any) -> Tensor:
        return self.head(self.relu(self.norm(self.conv(images * scale))).mean((2, 3)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(images=batch[0], scale=0.5, anything=None), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0], scale=0.5), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> DataLoader[Any]:
    x = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), batch_size=4)


def qat() -> QuantizationAwareTraining:
    return QuantizationAwareTraining(
        weight={"format": "int4", "range": "learned"}, activation={"format": "int8", "range": "static"}
    )


def fit(path: Path, *callbacks: Callback, epochs: int = 2) -> tuple[Images, Trainer]:
    seed_everything(0, verbose=False)
    module = Images()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        default_root_dir=path,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data())
    return module, trainer


def test_15862_forward_takes_keyword_arguments(tmp_path: Path) -> None:
    """Its wrapper of ``forward`` took positional arguments only. Here ``forward`` is the class's own."""
    module, _ = fit(tmp_path, qat())
    assert "forward" not in vars(module)
    assert module.forward.__func__ is Images.forward
    module(images=torch.randn(1, 1, 6, 6), scale=2.0, anything=None)


def test_12896_a_checkpoint_is_tested_after_the_fit(tmp_path: Path) -> None:
    """It had converted the model when the fit ended, and the checkpoint of before no longer fitted."""
    module, trainer = fit(tmp_path, qat(), ModelCheckpoint(tmp_path, filename="last"))
    path = str(tmp_path / "last.ckpt")
    same, again = trainer.test(module, data(), verbose=False), trainer.test(module, data(), path, verbose=False)
    assert same == again == trainer.test(ckpt_path="best", dataloaders=data(), verbose=False)
    assert not any(type(layer) in (nn.Conv2d, nn.Linear) for layer in module.modules())


def test_12890_batch_norm_is_left_in_training(tmp_path: Path) -> None:
    """It fused convolution and batch norm as for evaluation, and statistics stood still. Here nothing is fused."""
    module, _ = fit(tmp_path, qat())
    assert type(module.norm) is nn.BatchNorm2d and isinstance(module.conv, QuantConv2d)
    assert int(module.norm.num_batches_tracked) == 8
    assert not torch.equal(module.norm.running_mean, torch.zeros(4))
    assert module.norm.weight.grad is not None


@pytest.mark.parametrize("first", ["pruning", "quantization"])
def test_11047_pruning_and_quantization_in_one_run(tmp_path: Path, first: str) -> None:
    """Its copies of the layers were others than those that were pruned. Here a layer stays the object it was."""
    pruning = ModelPruning("l1_unstructured", amount=0.5, parameter_names=["weight"], use_global_unstructured=False)
    order = [pruning, qat()] if first == "pruning" else [qat(), pruning]
    module, _ = fit(tmp_path, *order, ModelCheckpoint(tmp_path, filename="last"))
    assert isinstance(module.conv, QuantConv2d) and isinstance(module.head, QuantLinear)
    for layer in (module.conv, module.head):
        pruned = layer.weight == 0
        assert pruned.float().mean() >= 0.5
        assert bool((layer.quantized_weight()[pruned] == 0).all())
    seed_everything(0, verbose=False)
    fresh = Images()
    qat().prepare(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(fresh.conv.weight == 0, module.conv.weight == 0)


def test_11047_layers_named_before_the_fit_are_the_ones_that_are_pruned(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module = Images()
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(module.conv, "weight")], amount=0.5)
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[qat(), pruning],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data())
    assert (module.conv.weight == 0).float().mean() == 0.5
    assert not bool((module.head.weight == 0).any())


def test_6457_its_state_is_plain_data(tmp_path: Path) -> None:
    fit(tmp_path, qat(), ModelCheckpoint(tmp_path, filename="last"))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any("QuantizationAwareTraining" in name for name in content["callbacks"])
