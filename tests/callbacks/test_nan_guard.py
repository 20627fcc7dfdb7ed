from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.callbacks import nan_guard
from qtrain.callbacks.nan_guard import NanGuard
from qtrain.errors import ModelError
from qtrain.training.bnb_optimizers import AdamW8bit, PagedAdamW32bit
from qtrain.training.stochastic_adamw import StochasticAdamW

pytestmark = [
    # A few rows in memory need no workers, and a short run logs less often than Lightning's default.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    # Lightning 2.6 on torch 2.13.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]


class Root(nn.Module):
    """sqrt(w - w): 0 forward, and a gradient of inf x 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.weight * 0).sqrt()


class Regression(LightningModule):
    def __init__(self, *layers: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.scale = scale

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.layers(batch) ** 2).mean() * self.scale
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"train/again": loss})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByHand(Regression):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layers(batch).mean())
        optimizer.step()


def fit(model: LightningModule, rows: list[Tensor] | None = None, **keys: Any) -> None:
    rows = rows or [torch.ones(4) for _ in range(6)]
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[NanGuard()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **keys,
    )
    trainer.fit(model, DataLoader(rows, batch_size=1))  # type: ignore[arg-type]


def four() -> nn.Linear:
    return nn.Linear(4, 4)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_healthy_fit_goes_through() -> None:
    model = Regression(four(), nn.ReLU(), four())
    before = weights(model).clone()
    fit(model, accumulate_grad_batches=2)
    assert not torch.equal(weights(model), before)


def test_an_infinite_weight_is_named() -> None:
    model = Regression(four(), nn.Tanh(), nn.Sequential(four(), four()), four())
    broken = model.layers[2][1]  # type: ignore[index]
    with torch.no_grad():
        broken.weight[1, 1] = torch.inf
    with pytest.raises(ModelError) as caught:
        fit(model)
    message = str(caught.value)
    assert "at step 0 (epoch 0, batch 0)" in message
    assert "layers.2.1 (inf), whose weight is not finite either" in message or "layers.2.1 (nan), whose" in message
    assert "log" not in vars(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_bad_batch_of_an_accumulation_window_is_found_and_no_step_is_taken() -> None:
    rows = [torch.ones(4) for _ in range(8)]
    rows[5] = torch.full((4,), torch.nan)
    model = Regression(nn.Identity(), four())
    steps: list[Tensor] = []
    model.on_before_zero_grad = lambda optimizer: steps.append(weights(model).clone())  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"the loss is nan at step 1 \(epoch 0, batch 5\); .*: layers.0 \(nan\)"):
        fit(model, rows, accumulate_grad_batches=4)
    assert weights(model).isfinite().all()
    assert torch.equal(weights(model), steps[-1])


def test_a_gradient_alone_is_traced_to_the_layer_nearest_the_loss() -> None:
    model = Regression(four(), four(), Root(), four())
    before = weights(model).clone()
    with pytest.raises(ModelError, match=r"1 of 7 gradients are not at step 0 .*: layers\.2\.weight"):
        fit(model)
    assert torch.equal(weights(model), before)


def test_gradients_that_spread_towards_the_input_do_not_hide_their_source() -> None:
    class RootOfInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.gain).sqrt()

    with pytest.raises(ModelError, match=r"5 of 7 gradients are not .*: layers\.2\.gain"):
        fit(Regression(four(), four(), RootOfInput(), four()))


def test_a_loss_that_overflows_outside_every_module_is_told_so() -> None:
    with pytest.raises(ModelError, match="the loss is inf .*goes wrong in the loss itself"):
        fit(Regression(four(), scale=torch.inf))


def test_large_but_finite_gradients_pass() -> None:
    """Their squares overflow fp32: a 2-norm would cry wolf."""

    class Large(Regression):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layers(batch).mean() * 1e25

    model = Large(four())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    fit(model, max_steps=1)
    assert any(not torch.equal(own, parameter) for own, parameter in zip(before, model.parameters(), strict=True))


def test_a_gradient_outside_the_module_is_told_so() -> None:
    class Elsewhere(Regression):
        def __init__(self) -> None:
            super().__init__(four())
            self.hidden = [nn.Parameter(torch.zeros(4))]

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layers(batch).mean() + self.hidden[0].sqrt().sum() * 1.0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([*self.parameters(), *self.hidden], lr=0.1)

    with pytest.raises(ModelError, match="none of them a parameter of the module"):
        fit(Elsewhere())


def test_manual_optimization_is_guarded_too() -> None:
    model = ByHand(four())
    fit(model)
    with torch.no_grad():
        model.layers[0].weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="the loss is nan at step 0 .*cannot be run again"):
        fit(model)


class LeftOut(Regression):
    """By an optimizer that leaves out steps by itself."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer], *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.make = make
        self.seen: list[Tensor] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = self.make([{"params": list(self.parameters())}], lr=0.1)
        return self.optimizer

    def on_train_batch_end(self, *_: object) -> None:
        self.seen.append(weights(self).clone())


LEAVE_OUT = {
    "torch's, fused": partial(torch.optim.AdamW, fused=True),
    "rounding by chance": StochasticAdamW,
    "8-bit": AdamW8bit,
    "paged": PagedAdamW32bit,
}


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """As on a GPU; optimizers that were not waited for."""
    found: list[object] = []

    def later(look: Any, optimizer: torch.optim.Optimizer) -> bool:
        found.extend([optimizer] * nan_guard.leaves_out(optimizer))
        return nan_guard.leaves_out(optimizer)

    monkeypatch.setattr(nan_guard, "_later", later)
    return found


@pytest.mark.parametrize("kind", LEAVE_OUT)
@pytest.mark.parametrize("gradient_clip_val", [None, 0.3])
def test_a_step_that_the_optimizer_leaves_out_is_looked_at_a_step_later(
    kind: str, gradient_clip_val: float | None, later: list[object]
) -> None:
    rows = [torch.ones(4) for _ in range(8)]
    rows[4] = torch.full((4,), torch.nan)
    model = LeftOut(LEAVE_OUT[kind], nn.Identity(), four())
    with pytest.raises(ModelError, match=r"the loss is nan at step 4 \(epoch 0, batch 4\); .*: layers.0 \(nan\)"):
        fit(model, rows, gradient_clip_val=gradient_clip_val)
    assert len(later) == 5 and len(model.seen) == 5  # the sixth batch saw it
    assert torch.equal(model.seen[4], model.seen[3]) and torch.equal(weights(model), model.seen[3])
    assert not torch.equal(model.seen[3], model.seen[2]) and model.seen[3].isfinite().all()
    assert model.optimizer.found_inf is None  # a step that others take with it is taken


@pytest.mark.parametrize("kind", LEAVE_OUT)
def test_its_gradients_are_named_though_others_lie_there(kind: str, later: list[object]) -> None:
    class RootOnce(Root):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) if self.calls == 2 else x + self.weight

    model = LeftOut(LEAVE_OUT[kind], four(), four(), RootOnce(), four())
    with pytest.raises(ModelError, match=r"1 of 7 gradients are not at step 1 \(.*batch 1\); .*: layers\.2\.weight"):
        fit(model)
    assert torch.equal(weights(model), model.seen[0]) and len(later) == 2


def test_the_last_step_is_looked_at_before_anything_follows(later: list[object], tmp_path: Path) -> None:
    """The end, validation, a checkpoint, which is not written."""
    rows = [torch.ones(4), torch.full((4,), torch.nan)]
    bad = pytest.raises(ModelError, match="the loss is nan at step 1 ")
    with bad:
        fit(LeftOut(StochasticAdamW, four()), rows)

    class Validated(LeftOut):
        validated = 0

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.validated += 1

        def val_dataloader(self) -> Any:
            return DataLoader([torch.ones(4)])  # type: ignore[arg-type]

    model = Validated(StochasticAdamW, four())
    with bad:
        fit(model, [*rows, rows[0]], val_check_interval=2, num_sanity_val_steps=0)
    assert len(model.seen) == 2 and not model.validated

    class Saving(LeftOut):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

    with bad:
        fit(Saving(StochasticAdamW, four()), [*rows, rows[0]])
    assert [path.name for path in tmp_path.iterdir()] == ["0.ckpt"]


def test_a_healthy_fit_leaves_no_step_out(later: list[object]) -> None:
    def made() -> LeftOut:
        torch.manual_seed(0)
        return LeftOut(LEAVE_OUT["torch's, fused"], four())

    guarded, plain = made(), made()
    fit(guarded)
    optimizer = plain.configure_optimizers()
    for row in 6 * [torch.ones(1, 4)]:
        optimizer.zero_grad()
        (plain.layers(row) ** 2).mean().backward()
        optimizer.step()
    assert torch.equal(weights(guarded), weights(plain)) and len(later) == 6
    assert getattr(guarded.optimizer, "found_inf", None) is None


def test_another_optimizer_is_waited_for(later: list[object]) -> None:
    model = LeftOut(partial(torch.optim.AdamW, foreach=True), nn.Identity(), four())
    with pytest.raises(ModelError, match="the loss is nan at step 1 "):
        fit(model, [torch.ones(4), torch.full((4,), torch.nan), torch.ones(4)])
    assert len(model.seen) == 1 and not later


def test_gradients_are_left_to_an_fp16_scaler() -> None:
    """It skips steps that overflow and lowers its scale: an infinite gradient is its ordinary signal."""
    model = Regression(four())
    optimizer = model.configure_optimizers()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    guard = NanGuard()
    trainer: Any = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=object()),
        global_step=0,
        current_epoch=0,
        loggers=[],
        checkpoint_callback=None,
    )
    guard.on_before_optimizer_step(trainer, model, optimizer)
    trainer.precision_plugin.scaler = None
    with pytest.raises(ModelError, match="2 of 2 gradients"):
        guard.on_before_optimizer_step(trainer, model, optimizer)
