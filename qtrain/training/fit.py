"""From a config to a trained adapter, its figures and its report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from qtrain.callbacks.checkpoint_files import KEY
from qtrain.callbacks.samples import SampleGenerations
from qtrain.callbacks.scheduled_quantization import ScheduledQuantization
from qtrain.callbacks.throughput import Throughput
from qtrain.callbacks.trainable_checkpoint import read_checkpoint
from qtrain.config.compose import save_config
from qtrain.config.schema import Config
from qtrain.console import say
from qtrain.data.datamodule import LanguageData
from qtrain.evaluation.progress import progress_over
from qtrain.evaluation.recovery import Recovery
from qtrain.files import atomic_directory, read_json, sweep, write_json
from qtrain.methods.method import build_method
from qtrain.models.packed import save_packed
from qtrain.modules.block_chain import BlockError
from qtrain.modules.calibrate import start_weights
from qtrain.report.write import write_report
from qtrain.training import processes
from qtrain.training.bnb_optimizers import detour_words
from qtrain.training.first_batch import AtFirstBatch
from qtrain.training.lineage import log_trained, use_base
from qtrain.training.module import LanguageModule
from qtrain.training.optimizers import state_bytes
from qtrain.training.plan.plan import make_plan
from qtrain.training.plan.watch import PlanWatch
from qtrain.training.plan.words import brief_lines
from qtrain.training.run_directory import RunDirectory
from qtrain.training.sharding import ShardedStrategy, unshard
from qtrain.training.strategies import check_served
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


@processes.end_together()
def fit(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Train as ``config`` says and leave everything in ``run``; the figures, as fit.json holds them.

    Raises:
        QtrainError: data, model or checkpoint cannot be used; nothing of an earlier run is lost then.
    """
    begin = time.monotonic()
    checkpoint = run.start(resume=config.run.resume, overwrite=config.run.overwrite)
    step = read_checkpoint(str(checkpoint))["global_step"] if checkpoint else None
    if finished(step, config, run):
        say(f"this run has its {step} steps already: nothing to do (a larger trainer.max_steps goes on)")
        sweep(run.path)
        write_report(run.path)  # a process that was killed may have left none
        found: dict[str, Any] = read_json(run.result("fit"))
        return found
    if config.run.resume and checkpoint is None:
        say(f"no checkpoint in {run.checkpoints} yet: starting from the beginning")
    kept = run.kept_base() if checkpoint and build_method(config.method).keeps_base else None
    module = LanguageModule(
        config,
        progress=progress_over("quantizing"),
        packed=kept,
        scratch=run.scratch,
        restoring=checkpoint is not None,
    )
    data = LanguageData(config.data, module.tokenizer, seed=config.run.seed)
    L.seed_everything(config.run.seed, verbose=False)
    torch.set_float32_matmul_precision(config.run.matmul_precision)
    throughput = Throughput()
    trainer = L.Trainer(
        **trainer_arguments(config),
        logger=False,
        callbacks=[*_callbacks(config, run, module, data, step or 0), throughput],
        default_root_dir=run.path,
    )
    check_served(trainer, config, module.method.schedule)
    processes.join(trainer, module, config.trainer)
    data.setup("fit")
    say(data.summary.lines(), title="data")
    plan = make_plan(config, data, trainer.strategy.root_device, trainer.world_size)
    say(brief_lines(plan), title="plan")
    watch = PlanWatch(plan, run.result("plan"))
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    validated = config.data.validation is not None
    module.trainer = trainer
    # Codes that a start chose are those of rank 0: the others read them.
    with processes.one_after_zero(module.method.keeps_base and checkpoint is None):
        if processes.rank() and module.method.keeps_base:
            module.read_packed(run.kept_base())
        module.build(trainer.strategy.root_device, data)
        assert module.model is not None
        if trainer.is_global_zero:
            sweep(run.path)
            # Only now that data and model are known to be good does an earlier run give way.
            if checkpoint is None:
                run.clear()
                if module.method.keeps_base:
                    save_packed(module.method.plain_model(module.model), run.base)
                    shutil.rmtree(run.scratch, ignore_errors=True)
                _adopt(config, run, data)
    if checkpoint is not None:
        trainer.callbacks.append(AtFirstBatch(partial(_adopt, config, run, data)))  # type: ignore[attr-defined]
    own = read_checkpoint(str(checkpoint)).get(KEY, {}) if checkpoint else {}
    trainer.loggers = loggers(config, run.path, step, own.get("row"))
    use_base(config, trainer.loggers, config.model.path, module.base_fingerprint)
    state = state_bytes((p for p in module.model.parameters() if p.requires_grad), config.optimizer)
    detour = detour_words(config.optimizer.name, trainer.strategy.root_device)
    facts = [f"optimizer   {config.optimizer.name}, {state / 1e6:,.1f} MB of state{detour}"]
    facts += [f"loss        {module.loss_path}", f"layers      {module.fused}", f"recompute   {module.recompute}"]
    facts += [f"attention   {module.attention}", products(trainer, config.method.compute_dtype)]
    if module.loading is not None:
        facts.append(f"loading     {module.loading}")
    if module.blocks is not None:
        facts.append(f"blocks      {module.blocks}")
    if module.cache is not None:
        facts.append(f"teacher     {module.cache}")
    if not validated and module.method.baselines(module.model):
        facts.append("recovery    not measured; with data.validation it is: full precision, PTQ and QAT in a table")
    facts = [*module.method.lines(module.model), *facts]
    say(facts, title="model")
    baselines: dict[str, float] = {}
    before: dict[str, float] = {}
    if checkpoint is None:
        # Before anything is moved: block by block distillation changes what full precision would be.
        baselines = _baselines(trainer, module, data) if validated else {}
        layerwise = config.distill.layerwise
        rows = max(getattr(config.method, "calibration_rows", 0), layerwise.rows if layerwise else 0)
        module.calibrate(data.rows("train", rows))
        if module.block_errors:
            say(block_lines(module.block_errors), title="blocks")
        before = _held_out(trainer, module, data) if validated else {}
        if trainer.is_global_zero:
            write_json(run.result("baselines"), {"baselines": baselines, "before": before})
    processes.agree(module.model)
    if isinstance(trainer.strategy, ShardedStrategy):
        module.shard(trainer.strategy.device_mesh["data_parallel"])
    processes.seed_apart(config.run.seed)
    say(f"to {goal(trainer)}, from {f'step {step}' if checkpoint else 'the start'}", title="training")
    trained_from = time.monotonic()
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    seconds = time.monotonic() - trained_from
    logged = own.get("metrics", {}) | dict(trainer.callback_metrics)  # the former where no step was left
    train_loss = number(logged.get("train/loss"))  # validating anew forgets it
    after = _held_out(trainer, module, data) if validated else {}
    if checkpoint is not None and run.result("baselines").exists():
        earlier = read_json(run.result("baselines"))
        baselines, before = earlier["baselines"], earlier["before"]
    init = getattr(config.method, "init", None)
    figures: dict[str, Any] = {
        "steps": trainer.global_step,
        "train_loss": train_loss,
        **{f"{key}_before": value for key, value in before.items()},
        **{f"{key}_after": value for key, value in after.items()},
        "recovery": _recovery(baselines, after, init),
        **({"init": init} if init else {}),
        "tokens_per_second": throughput.tokens_per_second,
        "step_seconds": throughput.step_seconds,
        "mfu": throughput.mfu,
        "peak_gib": throughput.peak_gib,
        "plan": watch.to_dict(),
        "trained_parameters": sum(p.numel() for p in module.model.parameters() if p.requires_grad),
        "model": [" ".join(fact.split()) for fact in facts],
        "loss_path": module.loss_path,
        "blocks": module.blocks,
        "recompute": str(module.recompute),
        "device": device_name(trainer.strategy.root_device),
        "train_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - begin, 1),
        "base": config.model.path,
        "base_fingerprint": module.base_fingerprint,
    }
    unshard(module.model)
    if trainer.is_global_zero:
        trained = run.path / module.method.artifact
        with atomic_directory(trained) as whole:
            module.method.save(module.model, whole)
            module.tokenizer.save_pretrained(whole)
        log_recovery(trainer.loggers, figures["recovery"], trainer.global_step)
        log_trained(config, trainer.loggers, trained, module.base_fingerprint, figures)
        close(trainer.loggers)
        write_json(run.result("fit"), figures)  # only now is there nothing left to go on with
        write_report(run.path)
    return figures


def _adopt(config: Config, run: RunDirectory, data: LanguageData) -> None:
    """What this run is from now on."""
    save_config(config, run.config)
    write_json(run.result("data"), data.summary.to_dict())


def _callbacks(
    config: Config, run: RunDirectory, module: LanguageModule, data: LanguageData, step: int
) -> list[Callback]:
    chosen = run_callbacks(config, run)
    if module.method.schedule.moves:
        find_ranges = partial(_find_ranges, data)
        chosen.append(ScheduledQuantization(module.method.schedule, from_step=step, find_ranges=find_ranges))
    if config.run.samples:
        chosen.append(SampleGenerations(config.run.samples, config.generate, dir=run.path))
    return chosen


def _find_ranges(data: LanguageData, trainer: L.Trainer, module: L.LightningModule) -> None:
    """Of the weights and activations as they are by now."""
    assert isinstance(module, LanguageModule) and module.model is not None
    rows = data.rows("train", getattr(module.config.method, "calibration_rows", 0))
    start_weights(module.model, again=True)
    module.method.calibrate(module.model, rows, trainer.precision_plugin.forward_context, progress_over("calibrating"))


def _held_out(trainer: L.Trainer, module: LanguageModule, data: LanguageData) -> dict[str, float]:
    found = trainer.validate(module, datamodule=data, verbose=False)[0]
    module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    return {"val_loss": found["val/loss"], "val_perplexity": found["val/perplexity"]}


def _baselines(trainer: L.Trainer, module: LanguageModule, data: LanguageData) -> dict[str, float]:
    """Perplexity of each baseline that the method names; the curves of the run begin after them."""
    assert module.model is not None
    found = {}
    own, trainer.loggers = trainer.loggers, []
    for name, entered in module.method.baselines(module.model).items():
        with entered():
            found[name] = _held_out(trainer, module, data)["val_perplexity"]
    trainer.loggers = own
    return found


def block_lines(errors: Sequence[BlockError]) -> list[str]:
    """What layer-by-layer distillation did: the first blocks, the middle and the last."""
    chosen = dict.fromkeys((0, len(errors) // 2, len(errors) - 1))
    return [f"{errors[i].name:<12}mean squared error {errors[i].before:.3e} to {errors[i].after:.3e}" for i in chosen]


def _recovery(baselines: dict[str, float], after: dict[str, float], init: str | None) -> dict[str, float | None] | None:
    if not baselines or not after:
        return None
    recovery = Recovery(baselines["full"], baselines["ptq"], after["val_perplexity"], init)
    if recovery.warning:
        say(f"warning: {recovery.warning}")
    return recovery.to_dict()
