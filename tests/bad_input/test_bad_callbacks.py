"""Callbacks and library calls that are used wrongly: a typed exception at the call, not a surprise in training."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import qtrain
from qtrain import peqa
from qtrain.callbacks import (
    CodeFlips,
    NanGuard,
    QuantizationAwareTraining,
    SampleGenerations,
    ScheduledQuantization,
    Throughput,
)
from qtrain.callbacks.checkpoint_mark import SENTENCE
from qtrain.errors import CheckpointError, ConfigError, ModelError, QtrainError
from qtrain.modules.schedule import QuantizationSchedule


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.trains_all = True

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters() if self.trains_all else [self.layer.weight, self.layer.bias], lr=0.1)


class Part(Net):
    def __init__(self) -> None:
        super().__init__()
        self.trains_all = False


def fit(module: L.LightningModule, *callbacks: L.Callback, data: Tensor | None = None) -> None:
    trainer = L.Trainer(
        max_steps=2,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.ones(4, 4) if data is None else data, batch_size=2))


def twice() -> None:
    module = Net()
    QuantizationAwareTraining(weight={"format": "int4"}).prepare(module)
    QuantizationAwareTraining(weight={"format": "int8"}).prepare(module)


def marked(text: str) -> Callable[[], object]:
    def load() -> object:
        module = Net()
        QuantizationAwareTraining(weight={"format": "int4"}).prepare(module)
        return module.load_state_dict({**module.state_dict(), f"{SENTENCE}{text}": torch.tensor(1)})

    return load


QAT = QuantizationAwareTraining
CASES: dict[str, tuple[type[QtrainError], Callable[[], object], dict[str, str]]] = {
    "option": (
        ConfigError,
        lambda: QAT(weight={"formt": "int4"}),
        dict(what="'formt' is no key", where="weight", rule="names and values of method.*", fix="qtrain fit"),
    ),
    "format": (
        ConfigError,
        lambda: QAT(weight={"format": "int99"}),
        dict(what="int99", where="weight", rule="names and values of method.*", fix="lists them"),
    ),
    "nothing to quantize": (
        ModelError,
        lambda: QAT(weight={"format": "int4"}).prepare(nn.Sequential(nn.ReLU())),
        dict(what="has no layer to quantize", where="Sequential", rule="linears and 2-d", fix="no pact options"),
    ),
    "pattern": (
        ModelError,
        lambda: QAT(weight={"format": "int4"}, skip=["nowhere.*"]).prepare(Net()),
        dict(what="nowhere.*", where="skip pattern", rule="patterns match whole names", fix="layer"),
    ),
    "twice": (
        ModelError,
        twice,
        dict(what="quantized with other weight", where="Net", rule="once", fix="made anew"),
    ),
    "cache of no decoder": (
        ModelError,
        lambda: QAT(kv_cache={"key": {"format": "int8"}}).prepare(Net()),
        dict(what="holds no transformers decoder", where="kv_cache", rule="keys and values", fix="kv_cache=None"),
    ),
    "a checkpoint of other options": (
        CheckpointError,
        marked(
            "QuantizationAwareTraining(weight={'format': 'int8'}) to the trainer's callbacks, or call its "
            "prepare(module) before load_state_dict"
        ),
        dict(what="quantized with other weight", where="checkpoint", rule="what trains", fix="'format': 'int8'"),
    ),
    "a checkpoint with a mark that is code": (
        CheckpointError,
        marked("__import__('os').mkdir('marker')"),
        dict(what="its mark cannot be read", where="checkpoint", rule="a call of literals", fix="save it again"),
    ),
    "steps between two looks": (
        ConfigError,
        lambda: CodeFlips(0),
        dict(what="every_n_steps=0", where="CodeFlips", rule="at least 1", fix="every_n_steps=10"),
    ),
    "steps in a measurement": (
        ConfigError,
        lambda: Throughput(every_n_steps=-1),
        dict(what="every_n_steps=-1", where="Throughput", rule="at least 1", fix="every_n_steps=10"),
    ),
    "momentum": (
        ConfigError,
        lambda: CodeFlips(momentum=2.0),
        dict(what="momentum=2.0", where="CodeFlips", rule="between 0 and 1", fix="momentum=0.01"),
    ),
    "ranges that nobody trains": (
        ModelError,
        lambda: fit(Part(), QAT(weight={"format": "int4", "range": "learned"})),
        dict(what="in no optimizer", where="layer.", rule="what is learned is trained", fix="configure_optimizers"),
    ),
    "a schedule longer than the training": (
        ConfigError,
        lambda: fit(Net(), ScheduledQuantization(QuantizationSchedule(start_step=100))),
        dict(what="training ends after 2 steps", where="step 100", rule="before the end", fix="trainer.max_steps"),
    ),
    "samples of what does not generate": (
        ModelError,
        lambda: fit(Net(), SampleGenerations(["hello"])),
        dict(what="has no model that generates", where="Net", rule="transformers' generate", fix="override"),
    ),
    "NaN": (
        ModelError,
        lambda: fit(Net(), NanGuard(), data=torch.full((4, 4), float("nan"))),
        dict(what="the loss is nan at step 0", where="layer (nan)", rule="not finite", fix="a lower learning rate"),
    ),
    "a method that is none": (
        ConfigError,
        lambda: qtrain.prepare(nn.Linear(2, 2), "qlroa"),  # type: ignore[arg-type]
        dict(what="'qlroa' is no method", where="qlroa", rule="method: qlora", fix="did you mean 'qlora'?"),
    ),
    "scales of a model without any": (
        ModelError,
        lambda: peqa.take_scales(nn.Linear(2, 2)),
        dict(what="has no packed layer", where="Linear", rule="packed integers", fix="RUN/base"),
    ),
    "a file of scales that is none": (
        CheckpointError,
        lambda: peqa.load_scales("nothing.safetensors"),
        dict(what="no such file", where="nothing.safetensors", rule="save_scales wrote", fix="RUN/scales"),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_a_wrong_use(name: str, raised: Callable[..., QtrainError]) -> None:
    kind, function, parts = CASES[name]
    raised(kind, function, **parts)
