"""One batch of 8 rows and four of 2 make the same step, whatever the lengths of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from qtrain.config.compose import load_recipe
from qtrain.data.datamodule import LanguageData
from qtrain.kernels import adamw as kernel
from qtrain.kernels.adamw import adamw_
from qtrain.training import gradients as early
from qtrain.training.gradients import EarlyClip, OnHost, early_clip, scale_, steps_are_read
from qtrain.training.module import LanguageModule
from qtrain.training.trainer import trainer_arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*validation_step. but have no .val_dataloader"),
]


class Gradients(L.Callback):
    """Keeps the gradients that the optimizer is given; afterwards there are none."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        def keep(*_: object) -> None:
            self.kept = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

        trainer.optimizers[0].register_step_post_hook(keep)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        assert trainer.global_step == 0 or all(p.grad is None for p in module.parameters())


def gradients(
    model: Path, chats: Path, run: Path, batch_size: int, accumulate: int, *extra: str
) -> dict[str, torch.Tensor]:
    config = load_recipe(
        None,
        *(f"model.path={model}", f"data.train={chats}", "data.max_length=64", f"data.batch_size={batch_size}"),
        *("data.packing=false", "data.shuffle=false", "method.r=4", "method.base=none", "trainer.max_steps=1"),
        *(f"trainer.accumulate_grad_batches={accumulate}", "trainer.accelerator=cpu", f"run.dir={run}"),
        *extra,
    )
    module = LanguageModule(config)
    data = LanguageData(config.data, module.tokenizer)
    keeper = Gradients()
    arguments = trainer_arguments(config) | {"logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(**arguments, callbacks=[keeper])
    trainer.fit(module, datamodule=data)
    return keeper.kept


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "\n".join(
            f'{{"prompt": "count to {n}", "completion": "{" ".join(map(str, range(1 + 3 * n % 11)))}"}}'
            for n in range(8)
        )
    )
    return path


def test_accumulation_does_not_change_the_gradient(tiny_llama_dir: Path, chats: Path, tmp_path: Path) -> None:
    whole = gradients(tiny_llama_dir, chats, tmp_path / "a", 8, 1)
    parts = gradients(tiny_llama_dir, chats, tmp_path / "b", 2, 4)
    assert whole.keys() == parts.keys()
    assert len(whole) == 28
    difference = torch.cat([(whole[n] - parts[n]).flatten() for n in whole]).norm()
    size = torch.cat([whole[n].flatten() for n in whole]).norm()
    assert size > 0
    assert difference / size < 1e-6


@pytest.mark.parametrize("accumulate", [1, 4])
def test_clipping_reaches_the_step(
    accumulate: int, tiny_llama_dir: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a factor of the gradients of the mean, which stay as they are; the same one however they came about."""
    factors: list[torch.Tensor] = []

    def spy(*arguments: Any) -> None:
        factors.append(arguments[-1])
        adamw_(*arguments)

    monkeypatch.setattr(kernel, "adamw_", spy)
    words = "optimizer.name=adamw_16bit", "trainer.gradient_clip_val=0.01"
    kept = gradients(tiny_llama_dir, chats, tmp_path / "a", 8 // accumulate, accumulate, *words)
    plain = gradients(tiny_llama_dir, chats, tmp_path / "b", 8, 1)
    norm = float(torch.cat([gradient.flatten() for gradient in plain.values()]).norm())
    assert norm > 0.02 and len(factors) == len(kept)
    assert all(float(factor) == pytest.approx(0.01 / norm, rel=1e-4) for factor in factors)
    for name, gradient in plain.items():
        torch.testing.assert_close(kept[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_clips_is_known_early_where_gradients_are_not_divided_later(
    accumulate: int, tiny_llama_dir: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[torch.Tensor | None] = []

    class Spied(EarlyClip):
        def factor(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor | None:
            found.append(super().factor(gradients))
            return found[-1]

    monkeypatch.setattr(early, "EarlyClip", Spied)
    monkeypatch.setattr(early, "_sees_gradients", lambda callback: False)  # ``Gradients`` does, and leaves them alone
    gradients(tiny_llama_dir, chats, tmp_path, 8 // accumulate, accumulate, "trainer.gradient_clip_val=0.01")
    assert len(found) == (accumulate == 1) and None not in found


@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step", "on_train_batch_end"])
def test_nothing_is_known_early_where_a_callback_of_others_sees_gradients(hook: str) -> None:
    theirs = type("Theirs", (L.Callback,), {hook: lambda *_: None})()
    trainer = L.Trainer(callbacks=[theirs], gradient_clip_val=0.5, logger=False, enable_checkpointing=False)
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    trainer.strategy.optimizers = [torch.optim.AdamW([weight])]
    found = early_clip(trainer)
    assert (found is None) == (hook != "on_train_batch_end")
    assert found is None or found.factor([weight.grad]) is not None
    weight.grad = torch.ones(3)
    assert found is None or found.factor([weight.grad]) is None  # another tensor


@pytest.mark.parametrize("touched", [False, True])
def test_an_early_factor_is_that_of_the_gradients_as_they_are(touched: bool, tiny_llama_dir: Path) -> None:
    words = f"model.path={tiny_llama_dir}", "method.base=none", "trainer.accelerator=cpu"
    clipped = LanguageModule(load_recipe(None, *words))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,))]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    kept = [weight.grad for weight in weights if weight.grad is not None]
    clipped._clip = EarlyClip(kept, 0.5)
    if touched:
        kept[1].mul_(3.0)
    twins = [torch.nn.Parameter(torch.zeros_like(weight)) for weight in weights]
    for twin, gradient in zip(twins, kept, strict=True):
        twin.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(twins, 0.5)
    clipped.configure_gradient_clipping(torch.optim.AdamW(weights), 0.5, "norm")
    for twin, gradient in zip(twins, kept, strict=True):
        assert twin.grad is not None and torch.equal(twin.grad, gradient)


def test_gradients_of_several_dtypes_are_scaled_in_their_own() -> None:
    """fp32, fp64 and fp16 by the exact factor, bf16 by the nearest one that it has."""
    factor = torch.tensor(1 / 100_003)
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.bfloat16)
    found = [torch.randn(7, 5, generator=torch.Generator().manual_seed(n)).to(kind) for n, kind in enumerate(kinds)]
    expected = [
        (x.double() * (factor.bfloat16() if x.dtype == torch.bfloat16 else factor).double()).to(x.dtype) for x in found
    ]
    scale_(found, factor)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=torch.finfo(one.dtype).eps, atol=0)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_is_logged_lies_on_the_host(
    accumulate: int, tiny_llama_dir: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logger would wait for a GPU's tensor, and with it for all that was launched before."""
    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(LanguageModule, "log", lambda self, name, value, **_: logged.update({name: value}))
    kept = gradients(tiny_llama_dir, chats, tmp_path, 8 // accumulate, accumulate)
    assert kept and logged.keys() == {"train/loss", "train/lr"}
    assert all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in logged.values())


@pytest.mark.gpu
def test_sums_arrive_before_they_are_read() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        x = x @ x / 4096
    total = torch.stack((x.double().sum() * 0 + 3.0, x.double().sum() * 0 + 4.0))
    assert OnHost(total).get().tolist() == [3.0, 4.0]


@pytest.mark.gpu
def test_sums_do_not_wait_for_what_was_launched_after_them() -> None:
    x, total = torch.randn(8192, 8192, device="cuda"), torch.tensor([3.0, 4.0], device="cuda")
    since, busy = torch.cuda.Event(), torch.cuda.Event()
    since.record()
    for _ in range(200):
        x = x @ x / 8192
    busy.record()
    assert OnHost(total, since=since).get().tolist() == [3.0, 4.0] and not busy.query()
    assert OnHost(total).get().tolist() == [3.0, 4.0] and busy.query()


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({}, False),
        ({"enable_progress_bar": True}, True),
        ({"logger": CSVLogger, "log_every_n_steps": 1}, True),
        ({"logger": CSVLogger, "log_every_n_steps": 10}, False),
    ],
)
def test_who_reads_each_step(given: dict[str, Any], read: bool, tmp_path: Path) -> None:
    given = {name: value(tmp_path) if value is CSVLogger else value for name, value in given.items()}
    usual: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    assert (
        steps_are_read(L.Trainer(**usual | {"enable_checkpointing": False, "enable_model_summary": False} | given))
        is read
    )


@pytest.mark.gpu
def test_what_nobody_reads_stays_on_the_gpu() -> None:
    total = torch.tensor([3.0, 4.0], dtype=torch.float64, device="cuda")
    assert OnHost(total, asked=False).get() is total
