"""From a config to a trained image classifier, its figures and its report."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import nn

from qtrain.callbacks.checkpoint_files import KEY
from qtrain.callbacks.throughput import Throughput
from qtrain.callbacks.trainable_checkpoint import read_checkpoint
from qtrain.config.compose import save_config
from qtrain.config.schema import VisionConfig
from qtrain.console import say
from qtrain.errors import ConfigError
from qtrain.files import read_json, sweep, write_json
from qtrain.report.write import write_report
from qtrain.training import processes
from qtrain.training.first_batch import AtFirstBatch
from qtrain.training.image_quantization import (
    diagnostics,
    quantization,
    quantization_lines,
    recovery,
    untrained_accuracies,
)
from qtrain.training.lineage import log_trained, use_base
from qtrain.training.run_directory import RunDirectory
from qtrain.training.tracking import close, log_recovery, loggers
from qtrain.training.trainer import (
    device_name,
    finished,
    goal,
    number,
    products,
    run_callbacks,
    trainer_arguments,
)
from qtrain.vision.classifier import ImageClassifier
from qtrain.vision.config import VisionModelSection
from qtrain.vision.datamodule import ImageData
from qtrain.vision.files import find_weights
from qtrain.vision.resnet import ResNet
from qtrain.vision.weights import load_weights, save_weights

ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6}


def build_model(section: VisionModelSection) -> ResNet:
    """The network that ``model.*`` describes, with fresh weights or those of ``model.weights``.

    Raises:
        ModelError: weights that do not fit.
    """
    depth = int(section.architecture.removeprefix("resnet"))
    model = ResNet(depth, section.width, section.classes, activation=ACTIVATIONS[section.activation])
    if section.weights:
        load_weights(model, find_weights(section.weights))
    return model


@processes.end_together()
def fit(config: VisionConfig, run: RunDirectory) -> dict[str, Any]:
    """Train as ``config`` says and leave everything in ``run``; the figures, as fit.json holds them.

    Raises:
        QtrainError: data or checkpoint cannot be used; nothing of an earlier run is lost then.
    """
    begin = time.monotonic()
    checkpoint = run.start(resume=config.run.resume, overwrite=config.run.overwrite)
    step = read_checkpoint(str(checkpoint))["global_step"] if checkpoint else None
    if finished(step, config, run):
        say(f"this run has its {step} steps already: nothing to do (a larger trainer.max_steps goes on)")
        write_report(run.path)  # a process that was killed may have left none
        found: dict[str, Any] = read_json(run.result("fit"))
        return found
    data = ImageData(config.data, classes=config.model.classes, seed=config.run.seed)
    data.setup("fit")
    say(f"{'images':<12}" + ", ".join(f"{len(images):,} {name}" for name, images in data.splits.items()), title="data")
    L.seed_everything(config.run.seed, verbose=False)
    torch.set_float32_matmul_precision(config.run.matmul_precision)
    optimizer = config.optimizer.model_dump(exclude={"name"})
    module = ImageClassifier(build_model(config.model), **optimizer)
    quantizing, throughput = quantization(config.method), Throughput()
    # Shapes never change, and a step takes milliseconds, less than logging it.
    arguments = trainer_arguments(config, benchmark=True, log_every_n_steps=20)
    of_quantization = [quantizing, *diagnostics(arguments["log_every_n_steps"])] if quantizing else []
    trainer = L.Trainer(
        **arguments,
        logger=False,
        callbacks=[*of_quantization, *run_callbacks(config, run), throughput],
        default_root_dir=run.path,
    )
    _check_length(trainer)
    processes.join(trainer, module, config.trainer)
    untrained: dict[str, float] = {}
    if quantizing and config.model.weights and checkpoint is None:
        untrained = untrained_accuracies(module, quantizing, data, arguments)
    if quantizing:
        quantizing.prepare(module)
    # Only now that data and model are known to be good does an earlier run give way.
    if trainer.is_global_zero:
        sweep(run.path)
        if checkpoint is None:
            run.clear()
            _adopt(config, run, data)
    if checkpoint is not None:
        trainer.callbacks.append(AtFirstBatch(partial(_adopt, config, run, data)))  # type: ignore[attr-defined]
    own = read_checkpoint(str(checkpoint)).get(KEY, {}) if checkpoint else {}
    trainer.loggers = loggers(config, run.path, step, own.get("row"))
    base = _fingerprint(config.model.weights)
    use_base(config, trainer.loggers, config.model.weights, base)
    if checkpoint is None:
        if trainer.is_global_zero:
            write_json(run.result("baselines"), untrained)
    elif run.result("baselines").exists():
        untrained = read_json(run.result("baselines"))
    parameters = sum(p.numel() for p in module.parameters())
    network = f"{'network':<12}{config.model.architecture}, width {config.model.width}, {parameters:,} parameters"
    say([network, *quantization_lines(config.method, module), products(trainer)], title="model")
    say(f"to {goal(trainer)}, from {f'step {step}' if checkpoint else 'the start'}", title="training")
    trained_from = time.monotonic()
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    seconds = time.monotonic() - trained_from
    logged = own.get("metrics", {}) | dict(trainer.callback_metrics)  # the former where no step was left
    train_loss = number(logged.get("train/loss"))  # evaluating forgets it
    measured = {}
    if config.data.validation_share:
        measured = _measured("val", trainer.validate(module, datamodule=data, verbose=False))
    measured |= _measured("test", trainer.test(module, datamodule=data, verbose=False))
    recovered = recovery(untrained, measured["test_accuracy"]) if quantizing else None
    if recovered and recovered.warning:
        say(f"warning: {recovered.warning}")
    figures: dict[str, Any] = {
        "steps": trainer.global_step,
        "train_loss": train_loss,
        **measured,
        "recovery": recovered.to_dict() if recovered else None,
        "images_per_second": throughput.samples_per_second,
        "step_seconds": throughput.step_seconds,
        "peak_gib": throughput.peak_gib,
        "trained_parameters": parameters,
        "device": device_name(trainer.strategy.root_device),
        "train_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - begin, 1),
    }
    if trainer.is_global_zero:
        weights = run.path / "weights"
        save_weights(module.model, weights)
        log_recovery(trainer.loggers, figures["recovery"], trainer.global_step)
        log_trained(config, trainer.loggers, weights, base, figures)
        close(trainer.loggers)
        write_json(run.result("fit"), figures)  # only now is there nothing left to go on with
        write_report(run.path)
    return figures


def _adopt(config: VisionConfig, run: RunDirectory, data: ImageData) -> None:
    """What this run is from now on."""
    save_config(config, run.config)
    write_json(run.result("data"), data.summary())


def _fingerprint(weights: str | None) -> str | None:
    """Of the weights that the run began with; a classifier's are few enough to be hashed whole."""
    return hashlib.sha256(find_weights(weights).read_bytes()).hexdigest()[:32] if weights else None


def _check_length(trainer: L.Trainer) -> None:
    if trainer.max_steps == -1 and trainer.max_epochs == -1:
        raise ConfigError(
            "the number of steps is not known",
            rule="the learning rate reaches 0 with the last one; trainer.max_time has no known end",
            fix="trainer.max_epochs=30, or trainer.max_steps=N",
        )


def _measured(split: str, found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {f"{split}_{figure}": found[0][f"{split}/{figure}"] for figure in ("loss", "accuracy")}
