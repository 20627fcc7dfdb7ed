"""Our side of a row: the command itself, or its LightningModule under its Trainer on a model made in place."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import Any, TextIO
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from benchmarks.gpu.measure import Figures, NotHere, Sizes, peak_gib, random_batches
from benchmarks.gpu.shapes import Shape
from qtrain.callbacks.throughput import Throughput
from qtrain.cli import main as qtrain
from qtrain.config.compose import load_recipe
from qtrain.config.schema import Config
from qtrain.errors import QtrainError
from qtrain.modules.token_loss import with_kept
from qtrain.training.module import LanguageModule
from qtrain.training.optimizers import state_bytes
from qtrain.training.trainer import trainer_arguments


class _Twice(io.StringIO):
    """Keeps what is written, and shows it."""

    def __init__(self, shown: TextIO) -> None:
        super().__init__()
        self.shown = shown

    def write(self, text: str) -> int:
        self.shown.write(text)
        return super().write(text)


def fit_command(
    words: Sequence[str], asked: argparse.Namespace, flops_per_token: int, size: Sizes, *, together: int | None = None
) -> Figures:
    """``qtrain fit WORDS`` in this process; its figures are its own, measured ``together`` steps at a time.

    Raises:
        NotHere: the command refused, with its own words.
    """
    directory = asked.work / f"run-{asked.case}-{os.getpid()}"  # rows beside this one have cases of this name too
    words = [*words, f"run.dir={directory}", "run.overwrite=true"]
    print("$ qtrain fit", *words, file=sys.stderr, flush=True)
    shown, errors = _Twice(sys.stderr), _Twice(sys.stderr)
    # Of fewer steps than the command's ten: medians need several.
    meter = partial(Throughput, every_n_steps=together or size.together, warmup_steps=size.warm)
    with mock.patch("qtrain.training.fit.Throughput", meter), redirect_stdout(shown), redirect_stderr(errors):
        status = qtrain(["fit", *words])
    if status:
        raise NotHere(" ".join(errors.getvalue().split())[:300] or f"exit status {status}")
    fit = json.loads((directory / "fit.json").read_text(encoding="utf-8"))
    shutil.rmtree(directory)  # adapter and checkpoint: 2 GB of a 7B
    facts = ("layers ", "blocks ", "loss ", "attention ", "recompute ", "kernels ", "products ", "base ")
    said = [" ".join(line.split()) for line in shown.getvalue().splitlines() if line.startswith(facts)]
    more = {"fit_seconds": fit["seconds"], "train_loss": fit["train_loss"]}
    peak = fit["peak_gib"] if torch.cuda.is_available() else None
    return Figures(fit["tokens_per_second"], peak, flops_per_token, said, more)


class _Lines(Callback):
    """What the method says of a model while it trains: afterwards it lies on the CPU."""

    def __init__(self, module: LanguageModule) -> None:
        self.module, self.said = module, list[str]()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep its lines."""
        assert self.module.model is not None
        self.said = [" ".join(line.split()) for line in self.module.method.lines(self.module.model)]


def train_ours(
    base: LlamaForCausalLM, words: Sequence[str], shape: Shape, size: Sizes, callbacks: Sequence[Callback] = ()
) -> Figures:
    """``base`` prepared and trained as the config says, on random ids; no checkpoints, no files."""
    try:
        config = load_recipe(None, f"data.batch_size={size.rows}", f"data.max_length={size.length}", *words)
    except QtrainError as error:
        raise NotHere(" ".join(str(error).split())) from None
    assert isinstance(config, Config)
    module = LanguageModule(config, base=base)
    lines = _Lines(module)
    found = train(module, config, shape, size, callbacks=[*callbacks, lines])
    assert module.model is not None
    trained = [p for p in module.model.parameters() if p.requires_grad]
    found.said = [*lines.said, f"layers {module.fused}", f"loss {module.loss_path}", f"recompute {module.recompute}"]
    found.said += [f"blocks {module.blocks}"] if module.blocks else []
    found.said.append(f"attention {module.attention}")
    found.more["state_gib"] = round(state_bytes(trained, config.optimizer) / 2**30, 3)
    return found


def train(
    module: L.LightningModule,
    config: Config,
    shape: Shape,
    size: Sizes,
    *,
    callbacks: Sequence[Callback] = (),
    trains: bool | None = None,
    **preferred: Any,
) -> Figures:
    """``module`` under the Trainer that `qtrain fit` makes from ``config``.

    Args:
        trains: whether weights do, for the formula; default: where the method is qat.
        preferred: other arguments of the Trainer.
    """
    torch.set_float32_matmul_precision(config.run.matmul_precision)
    meter = Throughput(every_n_steps=size.together, warmup_steps=size.warm)
    trainer = L.Trainer(
        **{**trainer_arguments(config), "max_steps": size.warm + size.steps, "enable_progress_bar": False, **preferred},
        logger=False,
        enable_checkpointing=False,
        callbacks=[meter, *callbacks],
    )
    batches = [counted(batch) for batch in random_batches(shape.vocab, size)]
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]  # a list is a dataset
    assert meter.tokens_per_second is not None
    trains = config.method.name == "qat" if trains is None else trains
    return Figures(meter.tokens_per_second, peak_gib() and meter.peak_gib, shape.flops_per_token(trains=trains))


def counted(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the counts that the data module gives."""
    labels = batch["labels"]
    return {**with_kept(batch), "tokens": torch.tensor(labels.numel()), "loss_tokens": (labels[:, 1:] != -100).sum()}
