from __future__ import annotations

import csv
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.callbacks import throughput
from qtrain.callbacks.throughput import Throughput
from qtrain.evaluation import flops
from qtrain.evaluation.flops import flops_per_token, peak_flops

pytestmark = [
    # A few rows in memory need no workers, and a short run may log less often than Lightning's default.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    # Lightning 2.6 on torch 2.13.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
]


class Bigram(LightningModule):
    """A table of logits; validation takes as long as it is told to."""

    def __init__(self, validation_seconds: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 16)
        self.validation_seconds = validation_seconds

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids = batch["input_ids"]
        return nn.functional.cross_entropy(self.table(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(self.validation_seconds)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(count: int) -> DataLoader[Any]:
    """Batches of two rows with six tokens and two of padding."""
    row = {"input_ids": torch.arange(8), "attention_mask": torch.tensor([1] * 6 + [0] * 2)}
    return DataLoader([row] * 2 * count, batch_size=2)  # type: ignore[arg-type]


def fit(path: Path, callback: Throughput, count: int, model: LightningModule | None = None, **keys: Any) -> None:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(path, name="", version=""),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **keys,
    )
    trainer.fit(model or Bigram(), rows(count), rows(1))


def logged(path: Path, name: str) -> dict[int, float]:
    with (path / "metrics.csv").open() as file:
        return {
            int(row["step"]): float(row[f"throughput/{name}"])
            for row in csv.DictReader(file)
            if row.get(f"throughput/{name}")
        }


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by one second at each look."""
    ticks = iter(range(1000))
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def test_rates_of_each_measurement_after_the_warm_up(tmp_path: Path, ticking: None) -> None:
    callback = Throughput(every_n_steps=2, warmup_steps=1)
    fit(tmp_path, callback, 8)
    # Steps 1 and 2, 3 and 4, 5 and 6: 2 batches of 12 tokens and 2 rows in one tick; 7 is no whole measurement.
    assert logged(tmp_path, "tokens_per_second") == {2: 24.0, 4: 24.0, 6: 24.0}
    assert logged(tmp_path, "samples_per_second") == {2: 4.0, 4: 4.0, 6: 4.0}
    assert logged(tmp_path, "step_seconds") == {2: 0.5, 4: 0.5, 6: 0.5}
    assert callback.tokens_per_second == 24.0
    assert callback.mfu is None


def test_steps_are_optimizer_steps(tmp_path: Path, ticking: None) -> None:
    callback = Throughput(every_n_steps=2, warmup_steps=0)
    fit(tmp_path, callback, 12, accumulate_grad_batches=3)
    assert list(logged(tmp_path, "tokens_per_second").values()) == [6 * 12.0, 6 * 12.0]


def test_validation_is_not_counted(tmp_path: Path) -> None:
    callback = Throughput(every_n_steps=4, warmup_steps=0)
    begin = time.perf_counter()
    fit(tmp_path, callback, 8, Bigram(validation_seconds=0.5), val_check_interval=2, num_sanity_val_steps=0)
    assert time.perf_counter() - begin > 2
    assert callback.tokens_per_second is not None and callback.tokens_per_second > 4 * 12 / 0.5


def test_a_run_shorter_than_a_measurement_is_measured_whole(tmp_path: Path, ticking: None) -> None:
    callback = Throughput(every_n_steps=100, warmup_steps=2)
    fit(tmp_path, callback, 5)
    assert callback.tokens_per_second == 3 * 12
    assert len(logged(tmp_path, "tokens_per_second")) == 1
    fit(tmp_path / "shorter", callback, 1)
    assert callback.tokens_per_second is None


def test_peak_memory_is_the_process_on_a_cpu(tmp_path: Path) -> None:
    callback = Throughput(every_n_steps=1, warmup_steps=0)
    fit(tmp_path, callback, 2)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert callback.peak_gib == pytest.approx(int(status["VmHWM"].split()[0]) / 2**20, rel=0.05)
    assert max(logged(tmp_path, "peak_gib").values()) <= callback.peak_gib


def test_mfu_is_flops_over_the_peak(tmp_path: Path, ticking: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e6)
    monkeypatch.setattr(throughput, "flops_per_token", lambda model: 500)
    callback = Throughput(every_n_steps=1, warmup_steps=0)
    fit(tmp_path, callback, 3)
    assert callback.mfu == pytest.approx(12 * 500 / 1e6)
    assert set(logged(tmp_path, "mfu").values()) == {callback.mfu}


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
IDS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "tokens", "samples"),
    [
        ({"input_ids": IDS, "attention_mask": MASK, "tokens": torch.tensor([1, 4]), "samples": 7}, 5, 7),
        ({"input_ids": IDS, "tokens": 4, "samples": torch.tensor([2, 3])}, 4, 5),
        ({"input_ids": IDS, "attention_mask": MASK}, 3, 2),
        ({"input_ids": IDS, "attention_mask": MASK[:, None, None]}, 6, 2),
        ({"inputs_embeds": torch.zeros(2, 3, 4), "labels": IDS}, 6, 2),
        (IDS, 6, 2),
        ((IDS, torch.zeros(2)), 6, 2),
        ([torch.zeros(5, 3, 8, 8), torch.zeros(5)], 0, 5),
        ("text", 0, 0),
    ],
)
def test_what_counts_in_a_batch(batch: Any, tokens: int, samples: int) -> None:
    callback = Throughput()
    assert int(callback.tokens(batch)) == tokens
    assert int(callback.samples(batch)) == samples


def test_frozen_weights_cost_four_and_trained_ones_six() -> None:
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4, bias=False))
    model[1].requires_grad_(False)
    assert flops_per_token(model) == 4 * 8 * 16 + 6 * 16 * 4


def test_a_packed_weight_counts_by_its_true_shape() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 128, bias=False)
    before = flops_per_token(layer.requires_grad_(False))
    layer.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    layer.to("cpu")
    assert layer.weight.numel() == 64 * 128 / 2
    assert flops_per_token(layer) == before == 4 * 64 * 128


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("Unheard of", None)],
)
def test_peak_by_the_devices_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None
