"""The same prompts answered again and again, to see what training does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtrain.errors import ModelError
from qtrain.evaluation.config import GenerateSection
from qtrain.evaluation.generation import generate
from qtrain.files import write_text

COLUMNS = ["step", "prompt", "text"]


class SampleGenerations(Callback):
    """Answers ``prompts`` before training, after each validation of a fit, and at its end.

    Prints a table, appends ``{step, prompt, text}`` lines to ``DIR/samples.jsonl``, and logs a table to W&B where the
    run has it. Random generators are left as they were: training is the same to the bit with and without this.

    Args:
        prompts: what to continue or answer.
        section: decoding; default greedy, 128 tokens.
        tokenizer: default ``pl_module.tokenizer``.
        dir: where samples.jsonl goes; default ``trainer.default_root_dir``.

    Raises:
        ModelError: there is no tokenizer, or no model that generates.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        section: GenerateSection | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dir: str | Path | None = None,
    ) -> None:
        self.prompts, self.dir = list(prompts), dir
        self.section = section or GenerateSection.model_validate({})
        self._tokenizer = tokenizer
        self._latest_step = -1

    def model(self, pl_module: LightningModule) -> PreTrainedModel:
        """What generates: ``pl_module.model``, else the module itself; override for other names."""
        for candidate in (getattr(pl_module, "model", None), pl_module):
            if callable(getattr(candidate, "generate", None)):
                return candidate  # type: ignore[return-value]
        raise ModelError(
            f"{type(pl_module).__name__} has no model that generates",
            rule="pl_module.model, or the module itself, has transformers' generate",
            fix="override SampleGenerations.model",
        )

    def tokenizer(self, pl_module: LightningModule) -> PreTrainedTokenizerBase:
        """The argument, else ``pl_module.tokenizer``."""
        tokenizer = self._tokenizer or getattr(pl_module, "tokenizer", None)
        if tokenizer is None:
            raise ModelError(
                f"{type(pl_module).__name__} has no tokenizer", fix="SampleGenerations(prompts, tokenizer=tokenizer)"
            )
        return tokenizer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the model says before the first step; a run that goes on has that already."""
        if trainer.global_step == 0:
            self._sample(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What it says now."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What it says in the end, where no validation has just asked."""
        if self._latest_step != trainer.global_step:
            self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Every process generates: with sharded weights a forward pass needs them all.
        with trainer.precision_plugin.forward_context():
            answers = generate(self.model(pl_module), self.tokenizer(pl_module), self.prompts, self.section)
        self._latest_step = trainer.global_step
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        new = [{"step": step, "prompt": answer.prompt, "text": answer.text} for answer in answers]
        path = Path(self.dir or trainer.default_root_dir) / "samples.jsonl"
        # Lines of this step and later ones are of a run that was cut off and now goes on from an earlier checkpoint.
        samples = [sample for sample in _read(path) if sample["step"] < step] + new
        write_text(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
        # Lightning's progress bar lives on rich's global console, which keeps the two apart.
        rich.get_console().print(_table(step, new))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                # A W&B table cannot grow: each time it is logged whole.
                rows = [[sample[column] for column in COLUMNS] for sample in samples]
                logger.log_table("samples", columns=COLUMNS, data=rows, step=step)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _table(step: int, samples: list[dict[str, Any]]) -> Table:
    table = Table("prompt", "answer", title=f"samples at step {step}", title_justify="left", show_lines=True)
    for sample in samples:
        # Text and not str: what a model writes in brackets is no markup.
        table.add_row(Text(sample["prompt"]), Text(sample["text"]))
    return table
