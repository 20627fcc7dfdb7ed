from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qtrain.callbacks.code_flips import CodeFlips
from qtrain.callbacks.dead_gradients import DeadGradients
from qtrain.callbacks.layer_diagnostic import DiagnosticsFile, read_rows
from qtrain.callbacks.layer_sqnr import LayerSQNR
from qtrain.callbacks.quantization_aware_training import QuantizationAwareTraining
from qtrain.callbacks.saturation import Saturation
from qtrain.callbacks.scale_drift import ScaleDrift
from qtrain.modules.config import QuantizerSection
from qtrain.modules.prepare import prepare_modules

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
INT4 = QuantizerSection(format="int4")
LEARNED = {"format": "int4", "range": "learned"}


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Memory(Logger):
    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.rows.setdefault(key, {})[step or 0] = value

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def data() -> DataLoader[Any]:
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4)


def fit(path: Path, *callbacks: Callback, epochs: int = 1, ckpt: str | None = None, **keys: Any) -> tuple[Net, Memory]:
    seed_everything(0, verbose=False)
    module, memory = Net(), Memory()
    keys = {"logger": memory, "limit_train_batches": 6, **keys}
    Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=path,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **keys,
    ).fit(module, data(), ckpt_path=ckpt)
    return module, memory


def table(path: Path) -> list[dict[str, str]]:
    with (path / "diagnostics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def one_layer(weight: Tensor, **keys: Any) -> Any:
    module = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        module[0].weight.copy_(weight)
    prepare_modules(module, weight=QuantizerSection(**{"format": "int4", **keys}))
    return module


@given(
    codes=st.lists(st.lists(st.integers(-7, 7), min_size=6, max_size=6), min_size=2, max_size=12),
    momentum=st.sampled_from([0.01, 0.1, 0.5]),
)
@settings(max_examples=30, deadline=None)
def test_flips_and_oscillation_follow_the_papers_recursion(codes: list[list[int]], momentum: float) -> None:
    """Judge: the recursion written out in numpy."""
    module = one_layer(torch.ones(1, 7))
    callback = CodeFlips(momentum=momentum)
    seen = []
    for row in codes:
        with torch.no_grad():  # the last weight is 7 steps of 1: codes are the numbers themselves
            module[0].weight.copy_(torch.tensor([[*row, 7.0]]))
        seen.append(callback.measure(module))
    rate, direction = np.zeros(7), np.zeros(7)
    for before, now, found in zip(codes, codes[1:], seen[1:], strict=False):
        change = np.sign(np.array([*now, 7]) - np.array([*before, 7]))
        back = (change != 0) & (change == -direction)
        rate = momentum * back + (1 - momentum) * rate
        direction = np.where(change != 0, change, direction)
        assert found["code_flips"]["0"].item() == pytest.approx(float((change != 0).mean()), abs=1e-6)
        assert found["oscillation"]["0"].item() == pytest.approx(float(rate.mean()), abs=2e-3)


def test_a_change_of_format_begins_anew() -> None:
    module = one_layer(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    callback = CodeFlips()
    callback.measure(module)
    module[0].weight_quantizer.change_format("int8")
    assert callback.measure(module)["code_flips"] == {}
    assert callback.measure(module)["code_flips"]["0"].item() == 0


def test_weights_that_swing_are_frozen_at_their_average_code(tmp_path: Path) -> None:
    class Codes(Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []
            self.frozen: list[Tensor] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            swing = flips._swings["layers.0"]
            assert swing.frozen is not None
            self.seen.append(pl_module.layers[0].codes()[0].clone())
            self.frozen.append(swing.frozen.clone())

    codes = Codes()
    flips = CodeFlips(1, momentum=0.5, freeze_above=0.3)
    qat = QuantizationAwareTraining(weight=LEARNED, scale_lr=1e-5)
    module, memory = fit(tmp_path, qat, flips, codes, epochs=8)
    assert 0 < memory.rows["quantization/frozen"][47] < 1
    for before, now, frozen in zip(codes.seen, codes.seen[1:], codes.frozen, strict=False):
        assert torch.equal(before[frozen], now[frozen])
        assert bool((frozen <= codes.frozen[-1]).all())
    last = codes.frozen[-1]
    assert not torch.equal(codes.seen[5][~last], codes.seen[-1][~last])
    levels = module.layers[0].quantized_weight()
    assert torch.allclose(module.layers[0].weight[last], levels[last])


def test_a_resumed_run_freezes_what_the_whole_one_does(tmp_path: Path) -> None:
    def run(epochs: int, ckpt: str | None = None) -> dict[str, Tensor]:
        flips = CodeFlips(2, momentum=0.5, freeze_above=0.2)
        keep = ModelCheckpoint(tmp_path / f"{epochs}", filename="last")
        qat = QuantizationAwareTraining(weight={"format": "int4"})
        module, _ = fit(tmp_path, qat, flips, keep, epochs=epochs, ckpt=ckpt)
        assert any(bool(swing.frozen.any()) for swing in flips._swings.values() if swing.frozen is not None)
        return module.state_dict()

    whole = run(8)
    run(4)
    resumed = run(8, str(tmp_path / "4" / "last.ckpt"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    torch.load(tmp_path / "4" / "last.ckpt", weights_only=True)


@given(seed=st.integers(0, 2**16), format=st.sampled_from(["int2", "int4", "int8", "ternary", "fp8_e4m3"]))
@settings(max_examples=20, deadline=None)
def test_sqnr_is_signal_over_error(seed: int, format: str) -> None:
    module = one_layer(torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)), format=format)
    found = LayerSQNR().measure(module)["sqnr"]["0"].item()
    weight = module[0].weight.detach().double()
    error = weight - module[0].quantized_weight().detach().double()
    assert found == pytest.approx(float(10 * torch.log10(weight.square().sum() / error.square().sum())), rel=1e-4)


def test_dead_gradients_are_those_of_units_that_never_fire(tmp_path: Path) -> None:
    class Half(Net):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.layers[0].bias[:4] = -100.0

    seed_everything(0, verbose=False)
    memory = Memory()
    Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=memory,
        default_root_dir=tmp_path,
        callbacks=[QuantizationAwareTraining(weight={"format": "int8"}), DeadGradients(1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Half(), data())
    found = {row["layer"]: float(row["value"]) for row in table(tmp_path) if row["step"] == "0"}
    assert found == {"layers.0": 0.5, "layers.2": 0.5}


def test_saturation_of_weights_and_of_pacts_upper_end(tmp_path: Path) -> None:
    callback = Saturation(1)
    module = one_layer(torch.tensor([[7.0, -7.0, 1.0, 0.0], [14.0, 2.0, 2.0, 2.0]]))
    assert callback.measure(module)["weight_saturation"]["0"].item() == 3 / 8
    pact = {"format": "int4", "pact_alpha": 0.5}
    static = {"format": "int4", "range": "static", "bounds": (-1.0, 1.0)}
    qat = QuantizationAwareTraining(weight={"format": "int4"}, activation=static, pact=pact)
    seen: dict[str, list[Tensor]] = {"layers.0": [], "layers.1": []}

    class See(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            for name, inputs in seen.items():
                pl_module.get_submodule(name).register_forward_pre_hook(lambda m, x, inputs=inputs: inputs.append(x[0]))

    fit(tmp_path, qat, callback, See(), limit_train_batches=1)
    found = {
        row["layer"]: float(row["value"]) for row in table(tmp_path) if row["diagnostic"] == "activation_saturation"
    }
    images, before_relu = seen["layers.0"][-1], seen["layers.1"][-1]
    inside = (images / (1 / 7)).round().abs() < 7
    assert found["layers.0.input_quantizer"] == pytest.approx(1 - inside.float().mean().item(), abs=1e-5)
    top = (before_relu / (0.5 / 15)).round() >= 15
    assert found["layers.1.quantizer"] == pytest.approx(top.float().mean().item(), abs=1e-5)
    assert not callback._handles


def test_scale_drift_is_over_the_start_and_bounds_are_themselves(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(weight=LEARNED, pact={"format": "int4", "pact_alpha": 2.0}, scale_lr=0.001)
    fresh = Net()
    qat.prepare(fresh)
    seed_everything(0, verbose=False)
    start = Net()
    qat.prepare(start)
    keep = ModelCheckpoint(tmp_path, filename="last")
    module, memory = fit(tmp_path, qat, ScaleDrift(3), keep)
    last = {(row["diagnostic"], row["layer"]): float(row["value"]) for row in table(tmp_path) if row["step"] == "5"}
    scales = (module.layers[0].weight_quantizer.scale, start.layers[0].weight_quantizer.scale)
    ratio = (scales[0].detach().mean() / scales[1].detach().mean()).item()
    assert last["scale_drift", "layers.0.weight_quantizer"] == pytest.approx(ratio, rel=1e-4) and ratio != 1
    assert last["pact_alpha", "layers.1.quantizer"] == pytest.approx(module.layers[1].quantizer.alpha.item(), rel=1e-4)
    again, _ = fit(tmp_path, qat, ScaleDrift(3), keep, epochs=2, ckpt=str(tmp_path / "last.ckpt"))
    drift = [float(row["value"]) for row in table(tmp_path) if row["layer"] == "layers.0.weight_quantizer"]
    end = again.layers[0].weight_quantizer.scale.detach().mean() / scales[1].detach().mean()
    assert len(drift) == 4 and drift[-1] == pytest.approx(end.item(), rel=1e-4)


def test_all_at_once_in_one_file_and_in_the_logger(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(weight=LEARNED, activation={"format": "int8"}, scale_lr=1e-4)
    callbacks = [CodeFlips(2), DeadGradients(3), Saturation(2), ScaleDrift(3), LayerSQNR(6)]
    _, memory = fit(tmp_path, qat, *callbacks)
    rows = table(tmp_path)
    steps = {name: sorted({int(row["step"]) for row in rows if row["diagnostic"] == name}) for name in
             {row["diagnostic"] for row in rows}}  # fmt: skip
    assert steps == {
        "code_flips": [1, 3, 5],
        "oscillation": [1, 3, 5],
        "dead_gradients": [2, 5],
        "weight_saturation": [1, 3, 5],
        "activation_saturation": [1, 3, 5],
        "scale_drift": [2, 5],
        "sqnr": [5],
    }
    sqnr = [float(row["value"]) for row in rows if row["diagnostic"] == "sqnr"]
    assert memory.rows["quantization/sqnr"][5] == pytest.approx(sum(sqnr) / 2, rel=1e-4)
    assert memory.rows["quantization/sqnr_min"][5] == pytest.approx(min(sqnr), rel=1e-4)
    assert 10 < min(sqnr) < 40


def test_the_last_step_is_looked_at(tmp_path: Path) -> None:
    fit(tmp_path, QuantizationAwareTraining(weight={"format": "int4"}), LayerSQNR(100), epochs=-1, max_steps=4)
    assert {row["step"] for row in table(tmp_path)} == {"3"}


def test_training_is_the_same_to_the_bit_with_and_without_diagnostics(tmp_path: Path) -> None:
    def weights(*callbacks: Callback) -> dict[str, Tensor]:
        qat = QuantizationAwareTraining(weight=LEARNED, activation={"format": "int8"}, pact={"format": "int4"})
        return fit(tmp_path, qat, *callbacks)[0].state_dict()

    plain = weights()
    watched = weights(CodeFlips(1), DeadGradients(1), Saturation(1), ScaleDrift(1), LayerSQNR(1))
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_a_module_without_quantizers_has_no_figures(tmp_path: Path) -> None:
    _, memory = fit(tmp_path, CodeFlips(1), DeadGradients(1), Saturation(1), ScaleDrift(1), LayerSQNR(1))
    assert not memory.rows and not (tmp_path / "diagnostics.csv").exists()


def test_rows_of_a_run_that_was_cut_off_go_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "diagnostics.csv"
    first = DiagnosticsFile(path)
    for step in (1, 3, 5):
        first.add(step, [("sqnr", "a", 1.0)])
    other = DiagnosticsFile(path)
    other.add(5, [("flips", "a", 0.5)])
    with path.open("a") as file:
        file.write("7,sqnr,a,1.")  # killed while it wrote
    DiagnosticsFile(path).add(3, [("sqnr", "a", 2.0)])
    assert read_rows(path) == [["1", "sqnr", "a", "1"], ["5", "flips", "a", "0.5"], ["3", "sqnr", "a", "2"]]


def test_wandb_gets_a_histogram_of_the_layers(tmp_path: Path) -> None:
    logged: list[dict[str, Any]] = []

    class Fake(WandbLogger):
        def __init__(self) -> None:
            Logger.__init__(self)

        experiment = type("Run", (), {"log": staticmethod(logged.append)})()  # type: ignore[assignment]
        save_dir, name, version = str(tmp_path), "fake", "0"

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            pass

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

        def finalize(self, status: str) -> None:
            pass

    fit(tmp_path, QuantizationAwareTraining(weight={"format": "int4"}), LayerSQNR(6), logger=Fake())
    (histogram,) = [row for row in logged if "quantization/sqnr_by_layer" in row]
    assert histogram["trainer/global_step"] == 5
    assert sum(histogram["quantization/sqnr_by_layer"].histogram) == 2
