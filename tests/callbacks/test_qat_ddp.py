"""Two processes: the same ranges, the same levels, the same weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import sys, warnings
from pathlib import Path
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from qtrain.callbacks import QuantizationAwareTraining

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

if __name__ == "__main__":
    path, start = Path(sys.argv[1]), int(sys.argv[2])
    seed_everything(0, verbose=False)
    x = torch.randn(32, 4)
    callback = QuantizationAwareTraining(
        weight={"format": "int4", "range": "learned"},
        activation={"format": "int8", "range": "learned"},
        scale_lr=0.001, start_step=start, freeze_ranges_step=4, calibration_batches=2,
    )
    module = Net()
    trainer = Trainer(
        max_steps=5, accelerator="cpu", devices=2, logger=False, default_root_dir=path, callbacks=[callback],
        strategy="ddp_find_unused_parameters_true" if start else "ddp",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=2))
    torch.save(module.state_dict(), path / f"{trainer.global_rank}.pt")
    trainer.save_checkpoint(path / "last.ckpt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 2])
def test_two_processes_end_with_the_same_ranges_and_weights(tmp_path: Path, start: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(tmp_path), str(start)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one.keys() == other.keys() and any("input_quantizer.scale" in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(value.isfinite().all() for value in one.values())
    assert any(
        name.startswith("this checkpoint is quantized") for name in torch.load(tmp_path / "last.ckpt")["state_dict"]
    )
    assert result.stdout.count("quantization-aware training from step 0") == 1
