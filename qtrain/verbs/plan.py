"""`qtrain plan`"""

from __future__ import annotations

import lightning as L

from qtrain.console import hush_lightning, say
from qtrain.data.datamodule import LanguageData
from qtrain.models.load import load_tokenizer
from qtrain.training.plan.plan import make_plan
from qtrain.training.plan.words import show_memory, show_sample, step_lines
from qtrain.training.trainer import device_name, trainer_arguments
from qtrain.verbs.request import Request


def run(request: Request) -> None:
    """Read the data, size the model by its config, and show what a training would take; nothing is written."""
    hush_lightning()
    config = request.config
    data = LanguageData(config.data, load_tokenizer(config.model), seed=config.run.seed)
    data.setup("fit")
    trainer = L.Trainer(
        **trainer_arguments(config) | {"enable_progress_bar": False}, logger=False, enable_checkpointing=False
    )
    device = trainer.strategy.root_device
    say(data.summary.lines(), title="data")
    show_sample(data.summary.splits["train"])
    plan = make_plan(config, data, device, trainer.world_size)
    say(step_lines(plan), title="steps")
    show_memory(plan, config)
    say(f"on          {device_name(device)}" + (f", {trainer.world_size} of them" if trainer.world_size > 1 else ""))
