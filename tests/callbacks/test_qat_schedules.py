"""Schedules of QuantizationAwareTraining in a fit, and after a resume at any of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qtrain.callbacks.quantization_aware_training import QuantizationAwareTraining
from qtrain.modules.quantizers import quantizers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch"),
]
SCHEDULE: dict[str, Any] = {
    "weight": {"format": "int4", "range": "learned"},
    "activation": {"format": "int8", "range": "static"},
    "start_step": 2,
    "bits_schedule": {0: "int8", 4: "int4"},
    "freeze_ranges_step": 6,
    "calibration_batches": 2,
    "scale_lr": 1e-4,
}


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Watch(Callback):
    """What holds in the forward pass that leads to step s + 1."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[bool, str, float]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        quantizer = pl_module.layers[0].weight_quantizer
        self.seen[trainer.global_step] = (
            quantizer.enabled,
            quantizer.spec.format,
            float(quantizer.scale.sum().detach()),
        )


class Memory(Logger):
    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows += [(step, metrics)] if "quantization/on" in metrics else []  # type: ignore[list-item]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def data() -> DataLoader[Any]:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4)


def run(path: Path, steps: int, ckpt: str | None = None, **keys: Any) -> tuple[Any, Watch, Memory]:
    seed_everything(0, verbose=False)
    module, watch, memory = Net(), Watch(), Memory()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=path,
        callbacks=[QuantizationAwareTraining(**{**SCHEDULE, **keys}), watch],
        logger=memory,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(), ckpt_path=ckpt)
    trainer.save_checkpoint(path / f"{steps}.ckpt")
    return module, watch, memory


def test_transitions_happen_at_their_steps_and_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, watch, memory = run(tmp_path, 9)
    assert [watch.seen[step][0] for step in range(9)] == [False] * 2 + [True] * 7
    assert [watch.seen[step][1] for step in range(9)] == ["int8"] * 4 + ["int4"] * 5
    assert len({watch.seen[step][2] for step in (6, 7, 8)}) == 1 and watch.seen[4][2] != watch.seen[5][2]
    assert [(step, row["quantization/on"], row["quantization/weight_bits"]) for step, row in memory.rows] == [
        (0, 0.0, 8.0),
        (2, 1.0, 8.0),
        (4, 1.0, 4.0),
        (6, 1.0, 4.0),
    ]
    said = capsys.readouterr().out
    for line in (
        "full precision until quantization starts",
        "step 2: quantization on",
        "step 4: weights int8 -> int4",
        "step 6: learned ranges frozen",
    ):
        assert line in said


def test_a_later_start_begins_from_the_weights_and_activations_of_then(tmp_path: Path) -> None:
    module, _, _ = run(tmp_path, 3, start_step=3, bits_schedule=None)
    weight, quantizer = module.layers[0].weight, module.layers[0].weight_quantizer
    assert torch.allclose(quantizer.scale * 7, weight.abs().amax(1, keepdim=True), rtol=0.01)
    observed = torch.cat([x for at, (x, _) in enumerate(data()) if at in (1, 2)])
    assert torch.isclose(module.layers[0].input_quantizer.scale * 127, observed.abs().max())


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6, 7])
def test_after_a_resume_at_any_step_the_schedule_is_where_it_was(tmp_path: Path, stop: int) -> None:
    run(tmp_path, stop)
    content = torch.load(tmp_path / f"{stop}.ckpt", weights_only=True)["state_dict"]
    saved = content["layers.0.weight_quantizer.scale"]
    _, watch, memory = run(tmp_path, 9, str(tmp_path / f"{stop}.ckpt"))
    assert watch.seen[stop][:2] == (stop >= 2, "int8" if stop < 4 else "int4")
    assert watch.seen[stop][2] == pytest.approx(float(saved.sum()))
    assert [watch.seen[step][1] for step in range(stop, 9)] == [
        "int8" if step < 4 else "int4" for step in range(stop, 9)
    ]
    assert memory.rows[0][0] == stop and memory.rows[0][1]["quantization/weight_bits"] == (8.0 if stop < 4 else 4.0)


def test_an_evaluation_of_a_checkpoint_uses_the_bits_of_its_step(tmp_path: Path) -> None:
    module, _, _ = run(tmp_path, 3)
    callback = QuantizationAwareTraining(**SCHEDULE)
    fresh = Net()
    callback.prepare(fresh)
    assert {quantizer.spec.format for _, quantizer in quantizers(fresh) if quantizer.for_weight} == {"int4"}
    fresh.load_state_dict(torch.load(tmp_path / "3.ckpt", weights_only=True)["state_dict"])
    assert {quantizer.spec.format for _, quantizer in quantizers(fresh) if quantizer.for_weight} == {"int8"}
    x = next(iter(data()))[0]
    assert torch.equal(fresh.layers(x), module.layers(x))


def test_a_training_that_ends_before_its_schedule_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, 3)
    assert "training ended at step 3, and the schedule would go on to step 4" in capsys.readouterr().out
    run(tmp_path, 4)
    assert "the schedule would go on" not in capsys.readouterr().out


def test_frozen_ranges_stay_under_decay_and_momentum(tmp_path: Path) -> None:
    class Decayed(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    module = Decayed()
    keys = {**SCHEDULE, "start_step": 0, "bits_schedule": None, "freeze_ranges_step": 3}
    watch = Watch()
    Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[QuantizationAwareTraining(**keys), watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data())
    scales = [watch.seen[step][2] for step in range(6)]
    assert len(set(scales[3:])) == 1 and len(set(scales[:3])) == 3
