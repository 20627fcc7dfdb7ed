from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from qtrain.callbacks.samples import SampleGenerations
from qtrain.errors import ModelError
from qtrain.evaluation.config import GenerateSection

pytestmark = [
    # A few rows in memory need no workers, and a short run logs less often than Lightning's default.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    # Lightning 2.6 on torch 2.13.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
]
PROMPTS = ["The quick", "Hello [bold]you[/bold]"]
SECTION = GenerateSection.model_validate({"max_new_tokens": 4, "strategy": "sample", "seed": 3})


class CausalLM(LightningModule):
    """Anyone's module: dropout makes the random state matter."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        super().__init__()
        self.model, self.tokenizer = model.train(), tokenizer
        self.dropout = nn.Dropout(0.5)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss * self.dropout(torch.ones(8)).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.model(input_ids=batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def trainer(path: Path, *callbacks: SampleGenerations, **keys: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "default_root_dir": path,
        "val_check_interval": 2,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **(settings | keys))


def rows() -> DataLoader[Any]:
    return DataLoader([torch.arange(12) for _ in range(4)], batch_size=1)  # type: ignore[arg-type]


def samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]


def test_samples_before_training_and_after_each_validation(
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rich, "_console", None)
    module = CausalLM(tiny_llama, tiny_tokenizer)
    run = trainer(tmp_path, SampleGenerations(PROMPTS, SECTION))
    run.fit(module, rows(), rows())
    written = samples(tmp_path)
    assert [sample["step"] for sample in written] == [0, 0, 2, 2, 4, 4]
    assert [sample["prompt"] for sample in written] == PROMPTS * 3
    assert {sample["prompt"]: sample["text"] for sample in written[:2]} != {
        sample["prompt"]: sample["text"] for sample in written[4:]
    }
    printed = capsys.readouterr().out
    assert printed.count("samples at step") == 3
    assert "[bold]you" in printed
    run.validate(module, rows(), verbose=False)
    assert samples(tmp_path) == written


def test_training_is_the_same_to_the_bit_without_it(
    tmp_path: Path, tiny_llama_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    weights = []
    for callbacks in ([], [SampleGenerations(PROMPTS, SECTION, tokenizer=tiny_tokenizer)]):
        module = CausalLM(LlamaForCausalLM.from_pretrained(tiny_llama_dir))
        torch.manual_seed(0)
        trainer(tmp_path, *callbacks).fit(module, rows(), rows())
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(*weights)


def test_a_run_that_goes_on_replaces_what_the_cut_off_one_wrote_later(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    lines = [{"step": step, "prompt": "old", "text": "old"} for step in (0, 1, 3)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    callback = SampleGenerations(PROMPTS[:1], SECTION, tokenizer=tiny_tokenizer)
    run = trainer(tmp_path, callback)
    module = CausalLM(tiny_llama)
    monkey: Any = callback
    monkey.on_train_start = lambda *args: None
    run.fit(module, rows(), rows())
    assert [(sample["step"], sample["prompt"]) for sample in samples(tmp_path)] == [
        (0, "old"),
        (1, "old"),
        (2, PROMPTS[0]),
        (4, PROMPTS[0]),
    ]


def test_a_directory_and_a_model_of_ones_own(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    class Other(SampleGenerations):
        def model(self, pl_module: LightningModule) -> Any:
            return tiny_llama

    module = CausalLM(tiny_llama)
    callback = Other(PROMPTS, SECTION, tokenizer=tiny_tokenizer, dir=tmp_path / "deep" / "down")
    trainer(tmp_path, callback, max_steps=2).fit(module, rows(), rows())
    assert len(samples(tmp_path / "deep" / "down")) == 4


def test_what_is_missing_is_named(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="CausalLM has no tokenizer"):
        trainer(tmp_path, SampleGenerations(PROMPTS)).fit(CausalLM(tiny_llama), rows(), rows())
    with pytest.raises(ModelError, match="no model that generates"):
        SampleGenerations(PROMPTS, tokenizer=tiny_tokenizer).model(CausalLM(nn.Linear(1, 1)))


def test_wandb_gets_the_whole_table_each_time(
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables: list[dict[str, Any]] = []
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    monkeypatch.setattr(WandbLogger, "experiment", None)
    monkeypatch.setattr(WandbLogger, "log_table", lambda self, key, **table: tables.append({"key": key, **table}))
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda self, metrics, step=None: None)
    monkeypatch.setattr(WandbLogger, "log_hyperparams", lambda self, params: None)
    monkeypatch.setattr(WandbLogger, "finalize", lambda self, status: None)
    callback = SampleGenerations(PROMPTS, SECTION, tokenizer=tiny_tokenizer)
    trainer(tmp_path, callback, logger=logger).fit(CausalLM(tiny_llama), rows(), rows())
    assert [table["step"] for table in tables] == [0, 2, 4]
    assert [len(table["data"]) for table in tables] == [2, 4, 6]
    assert tables[0]["key"] == "samples" and tables[0]["columns"] == ["step", "prompt", "text"]
    assert [row[1] for row in tables[-1]["data"]] == PROMPTS * 3
