"""QuantizationAwareTraining in modules that know nothing of it: fit, evaluate, save, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from qtrain.callbacks.quantization_aware_training import QuantizationAwareTraining
from qtrain.callbacks.trainable_checkpoint import TrainableCheckpoint
from qtrain.errors import CheckpointError, ConfigError, ModelError
from qtrain.modules.quant_activation import PactActivation
from qtrain.modules.quant_conv import QuantConv2d
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizers import full_precision, quantizers

pytestmark = [
    # A few rows in memory need no workers, and a short run logs less often than Lightning's default.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    # Another trainer has another ModelCheckpoint, or none.
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
LEARNED = {"format": "int4", "range": "learned", "calibrate": "mse"}
STATIC = {"format": "int8", "range": "static"}


class Points(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(8, generator=torch.Generator().manual_seed(at))
        return x, (x[:4].sum() > 0).long()


class Net(LightningModule):
    """Someone else's module."""

    def __init__(self, optimizer: str = "adam") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        if self.training:
            self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        if self.hparams["optimizer"] == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 30))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader() -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(Points(), batch_size=4)


def trainer_of(path: Path, callback: QuantizationAwareTraining | None, steps: int = 6, **keys: Any) -> Trainer:
    callbacks = [*keys.pop("callbacks", []), *([callback] if callback else [])]
    defaults = {"enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks), "logger": False}
    return Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=path,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **keys},
    )


def make(**keys: Any) -> Any:
    seed_everything(0, verbose=False)
    return Net(**keys)


def qat(**keys: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(**{"weight": LEARNED, "activation": STATIC, **keys})


def fitted(path: Path, callback: QuantizationAwareTraining, module: Any = None, **keys: Any) -> Any:
    module = module or make()
    trainer_of(path, callback, **keys).fit(module, loader(), loader())
    return module


def test_layers_are_quantized_learned_scales_trained_and_activations_calibrated(tmp_path: Path) -> None:
    module = make()
    callback = qat()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(module, loader(), loader())
    assert [type(module.layers[at]) for at in (0, 2, 4)] == [QuantLinear] * 3
    optimized = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    fresh = make()
    callback.prepare(fresh)
    for at in (0, 2, 4):
        scale = module.layers[at].weight_quantizer.scale
        assert scale in optimized
        assert not torch.equal(scale, fresh.layers[at].weight_quantizer.scale)
        assert bool(module.layers[at].input_quantizer.scale.isfinite())
    largest = torch.stack([x for x, _ in map(Points().__getitem__, range(24))]).abs().max()
    assert torch.isclose(module.layers[0].input_quantizer.scale * 127, largest)


def test_the_loss_falls(tmp_path: Path) -> None:
    module = fitted(tmp_path, qat(activation={"format": "int4"}), steps=60)
    assert sum(module.losses[-6:]) < 0.6 * sum(module.losses[:6])


def test_validation_test_and_prediction_run_on_the_trained_levels(tmp_path: Path) -> None:
    callback = qat()
    module = make()
    trainer = trainer_of(tmp_path, callback, callbacks=[ModelCheckpoint(tmp_path, filename="last")])
    trainer.fit(module, loader(), loader())
    found = trainer.validate(module, loader(), verbose=False)[0]["val/loss"]
    with torch.no_grad():
        batches = list(loader())
        expected = sum(F.cross_entropy(module(x), y) for x, y in batches) / len(batches)
        with full_precision(module):
            plain = sum(F.cross_entropy(module(x), y) for x, y in batches) / len(batches)
    assert found == pytest.approx(float(expected), rel=1e-5) and found != pytest.approx(float(plain), rel=1e-4)
    path = str(tmp_path / "last.ckpt")
    fresh = make()
    assert trainer_of(tmp_path, qat()).test(fresh, loader(), ckpt_path=path, verbose=False) == [{"val/loss": found}]
    predicted = trainer_of(tmp_path, qat()).predict(make(), loader(), ckpt_path=path)
    assert predicted is not None
    assert all(torch.equal(one, module(x)) for one, (x, _) in zip(predicted, loader(), strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("keys", [{}, {"scale_lr": 0.001}, {"freeze_ranges_step": 4}], ids=["plain", "lr", "frozen"])
def test_a_resumed_run_ends_where_the_whole_one_does_to_the_bit(
    tmp_path: Path, optimizer: str, keys: dict[str, Any]
) -> None:
    options = {"weight": LEARNED, "activation": {"format": "int4", "range": "learned", "symmetric": False}, **keys}

    def run(epochs: int, ckpt: str | None = None) -> tuple[Any, Any]:
        """Epochs of three steps: what ``max_steps`` cuts off in mid-epoch repeats batches when Lightning resumes it."""
        module = make(optimizer=optimizer)
        keep = ModelCheckpoint(tmp_path / f"{epochs}", filename="last")
        callback = QuantizationAwareTraining(**options)
        trainer = trainer_of(tmp_path, callback, steps=-1, max_epochs=epochs, callbacks=[keep], limit_train_batches=3)
        trainer.fit(module, loader(), ckpt_path=ckpt)
        return module.state_dict(), trainer.optimizers[0].state_dict()

    whole, states = run(2)
    run(1)
    resumed, again = run(2, str(tmp_path / "1" / "last.ckpt"))
    assert whole.keys() == resumed.keys() and any("quantizer.scale" in name for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for number, state in states["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again["state"][number][key]))


def test_what_a_checkpoint_holds_is_plain_data(tmp_path: Path) -> None:
    fitted(tmp_path, qat(bits_schedule={0: "int8", 3: "int4"}), callbacks=[ModelCheckpoint(tmp_path, filename="last")])
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (mark,) = [key for key in content["state_dict"] if key.startswith("this checkpoint is quantized")]
    assert int(content["state_dict"][mark]) == 6
    assert "QuantizationAwareTraining(weight={'format': 'int4', 'range': 'learned'" in mark


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    fitted(tmp_path, qat(), callbacks=[ModelCheckpoint(tmp_path, filename="last")])
    return str(tmp_path / "last.ckpt")


SENTENCE = (
    r"this checkpoint is quantized: add qtrain\.callbacks\.QuantizationAwareTraining\(weight=.* or call its prepare"
)


@pytest.mark.parametrize("how", ["fit", "test", "load_from_checkpoint"])
def test_loaded_without_the_callback_it_says_what_is_missing(tmp_path: Path, checkpoint: str, how: str) -> None:
    with pytest.raises(RuntimeError, match=SENTENCE):
        if how == "fit":
            trainer_of(tmp_path, None).fit(make(), loader(), ckpt_path=checkpoint)
        elif how == "test":
            trainer_of(tmp_path, None).test(make(), loader(), ckpt_path=checkpoint)
        else:
            Net.load_from_checkpoint(checkpoint)


def test_the_call_it_names_works(tmp_path: Path, checkpoint: str) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    module = make()
    qat().prepare(module)
    module.load_state_dict(state)
    with torch.no_grad():
        found = F.cross_entropy(module(next(iter(loader()))[0]), next(iter(loader()))[1])
    assert bool(found.isfinite())
    (mark,) = [key for key in state if key.startswith("this checkpoint")]
    code = mark.split("qtrain.callbacks.", 1)[1].split(" to the trainer", 1)[0]
    again = make()
    eval(code, {"QuantizationAwareTraining": QuantizationAwareTraining}).prepare(again)
    again.load_state_dict(state)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("content", ["weights", "all"])
def test_files_of_weights_alone_say_it_too(tmp_path: Path, content: str) -> None:
    """Even where nothing but dynamic ranges would load into a plain module without a word."""
    keep = ModelCheckpoint(tmp_path, filename="last", save_weights_only=content == "weights")
    fitted(tmp_path, QuantizationAwareTraining(weight={"format": "int4"}), callbacks=[keep])
    with pytest.raises(RuntimeError, match=SENTENCE):
        Net.load_from_checkpoint(str(tmp_path / "last.ckpt"))


def test_other_options_than_the_checkpoints_are_refused(tmp_path: Path, checkpoint: str) -> None:
    callback = qat(weight={**LEARNED, "format": "int8"}, skip=["layers.0"])
    with pytest.raises(CheckpointError, match="with other skip, weight") as caught:
        trainer_of(tmp_path, callback).fit(make(), loader(), ckpt_path=checkpoint)
    assert "'format': 'int4'" in str(caught.value)


def test_a_module_is_not_prepared_twice_in_two_ways(tmp_path: Path) -> None:
    module = fitted(tmp_path, qat(), steps=1)
    with pytest.raises(ModelError, match="quantized with other activation"):
        trainer_of(tmp_path, qat(activation=None)).test(module, loader(), verbose=False)


def test_checkpoints_of_what_trains_go_with_it(tmp_path: Path) -> None:
    keep = TrainableCheckpoint(str(tmp_path / "checkpoints"))
    module = make()
    trainer_of(tmp_path, qat(), callbacks=[keep]).fit(module, loader())
    path = str(tmp_path / "checkpoints" / "step-000006.ckpt")
    resumed = make()
    trainer = trainer_of(tmp_path, qat(), steps=6, callbacks=[TrainableCheckpoint(str(tmp_path / "checkpoints"))])
    trainer.fit(resumed, loader(), ckpt_path=path)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in module.state_dict().items())
    with pytest.raises(RuntimeError, match=SENTENCE):
        make().load_state_dict(torch.load(path, weights_only=True)["state_dict"])


class Configured(Net):
    """Builds its layers in configure_model, as sharded models do."""

    def __init__(self) -> None:
        super().__init__()
        del self.layers

    def configure_model(self) -> None:
        if not hasattr(self, "layers"):
            seed_everything(0, verbose=False)
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


class SetUp(Configured):
    """Builds them in setup."""

    configure_model = LightningModule.configure_model

    def setup(self, stage: str) -> None:
        Configured.configure_model(self)


@pytest.mark.parametrize("kind", [Configured, SetUp])
def test_modules_that_build_their_layers_late(tmp_path: Path, kind: type[Net]) -> None:
    module = kind()
    keep = ModelCheckpoint(tmp_path, filename="last")
    trainer = trainer_of(tmp_path, qat(), callbacks=[keep])
    trainer.fit(module, loader(), loader())
    assert isinstance(module.layers[0], QuantLinear)
    assert not {"configure_model", "setup", "on_save_checkpoint"} & vars(module).keys()
    found = trainer.test(module, loader(), verbose=False)
    path = str(tmp_path / "last.ckpt")
    assert trainer_of(tmp_path, qat()).test(kind(), loader(), ckpt_path=path, verbose=False) == found
    trainer_of(tmp_path, qat(), steps=8).fit(kind(), loader(), ckpt_path=path)


def test_own_hooks_of_the_module_still_run_and_are_put_back(tmp_path: Path) -> None:
    class Owner(Net):
        def setup(self, stage: str) -> None:
            self.seen = stage

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = 7

    seed_everything(0, verbose=False)
    module = Owner()
    trainer_of(tmp_path, qat(), callbacks=[ModelCheckpoint(tmp_path, filename="last")]).fit(module, loader())
    assert module.seen == "fit"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["mine"] == 7


def test_calibration_leaves_loader_generators_modes_and_logs_alone(tmp_path: Path) -> None:
    """Shuffled data and dropout: batches and masks are those of a run that needs no calibration."""

    class Noisy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[Tensor, Tensor]] = []

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            if self.training:
                self.seen.append((batch[0], F.dropout(torch.ones(4), 0.5)))
            return super().training_step(batch, batch_idx)

    def seen(activation: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        seed_everything(0, verbose=False)
        module = Noisy()
        shuffled = DataLoader(Points(), batch_size=4, shuffle=True)
        trainer_of(tmp_path, qat(activation=activation), steps=8).fit(module, shuffled)
        return module.seen

    with_calibration, without = seen(STATIC), seen({"format": "int8"})
    assert len(with_calibration) == len(without) == 8
    for one, other in zip(with_calibration, without, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_manual_optimization_is_not_run_to_calibrate(tmp_path: Path) -> None:
    class ByHand(Net):
        automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    class Asked(QuantizationAwareTraining):
        def calibration_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
            pl_module(batch[0])

    with pytest.raises(ModelError, match="override QuantizationAwareTraining.calibration_step"):
        trainer_of(tmp_path, qat()).fit(ByHand("sgd"), loader())
    module = ByHand("sgd")
    trainer_of(tmp_path, Asked(weight=LEARNED, activation=STATIC)).fit(module, loader())
    assert bool(module.layers[4].input_quantizer.scale.isfinite())


def test_gradient_accumulation(tmp_path: Path) -> None:
    module = fitted(tmp_path, qat(start_step=2), steps=3, accumulate_grad_batches=2)
    assert all(quantizer.enabled for _, quantizer in quantizers(module))
    assert len(module.losses) == 6


def test_learned_ranges_that_no_optimizer_has_are_an_error(tmp_path: Path) -> None:
    class Some(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([layer.weight for layer in self.layers if isinstance(layer, nn.Linear)], lr=0.1)

    with pytest.raises(ModelError, match=r"layers\.0\.weight_quantizer\.scale and 2 more learned ranges"):
        trainer_of(tmp_path, qat()).fit(Some(), loader())


@pytest.mark.parametrize("keys", [{"weight": {"fromat": "int4"}}, {"kv_cache": {"share": "per_row"}}])
def test_mistakes_are_told_at_once(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="weight: 'fromat' is no key; did you mean 'format'|kv_cache: share"):
        QuantizationAwareTraining(**keys)


def test_options_begin_where_the_methods_do() -> None:
    sections = QuantizationAwareTraining(weight={"range": "learned"}, activation={}, pact={}).preparation.sections
    weight, activation, pact = (sections[key] for key in ("weight", "activation", "pact"))
    assert weight is not None and activation is not None and pact is not None
    assert (weight.format, activation.format) == ("int4", "int8")
    assert (pact.range, pact.symmetric) == ("pact", False)


class ConvNet(Net):
    """Convolutions with batch norm, images."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(-1, 1, 2, 4))


def test_a_convolutional_net_with_pact(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module = ConvNet()
    callback = QuantizationAwareTraining(weight={"format": "int4"}, pact={"format": "int4"}, first_last="int8")
    trainer_of(tmp_path, callback, steps=60).fit(module, loader(), loader())
    assert isinstance(module.layers[0], QuantConv2d) and isinstance(module.layers[2], PactActivation)
    assert sum(module.losses[-6:]) < 0.6 * sum(module.losses[:6])
    alpha = module.layers[2].quantizer.alpha
    assert alpha.requires_grad and 0 < alpha.item() < 10
