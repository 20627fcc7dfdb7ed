"""One batch of 8 rows and four of 2 make the same step, whatever the lengths of the rows."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch

from qtrain.config.compose import load_recipe
from qtrain.data.datamodule import LanguageData
from qtrain.training.module import LanguageModule
from qtrain.training.trainer import trainer_arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*validation_step. but have no .val_dataloader"),
]


class Gradients(L.Callback):
    """Keeps the gradients that the optimizer is given."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == 1:
            self.kept = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def gradients(model: Path, chats: Path, run: Path, batch_size: int, accumulate: int) -> dict[str, torch.Tensor]:
    config = load_recipe(
        None,
        *(f"model.path={model}", f"data.train={chats}", "data.max_length=64", f"data.batch_size={batch_size}"),
        *("data.packing=false", "data.shuffle=false", "method.r=4", "method.base=none", "trainer.max_steps=1"),
        *(f"trainer.accumulate_grad_batches={accumulate}", "trainer.accelerator=cpu", f"run.dir={run}"),
    )
    module = LanguageModule(config)
    data = LanguageData(config.data, module.tokenizer)
    keeper = Gradients()
    arguments = trainer_arguments(config) | {"logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(**arguments, callbacks=[keeper])
    trainer.fit(module, datamodule=data)
    return keeper.kept


def test_accumulation_does_not_change_the_gradient(tiny_llama_dir: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "\n".join(
            f'{{"prompt": "count to {n}", "completion": "{" ".join(map(str, range(1 + 3 * n % 11)))}"}}'
            for n in range(8)
        )
    )
    whole = gradients(tiny_llama_dir, chats, tmp_path / "a", 8, 1)
    parts = gradients(tiny_llama_dir, chats, tmp_path / "b", 2, 4)
    assert whole.keys() == parts.keys()
    assert len(whole) == 28
    difference = torch.cat([(whole[n] - parts[n]).flatten() for n in whole]).norm()
    size = torch.cat([whole[n].flatten() for n in whole]).norm()
    assert size > 0
    assert difference / size < 1e-6
