"""Quantization-aware training of any LightningModule, without editing it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from qtrain.callbacks.followed_hooks import FollowedHooks
from qtrain.callbacks.module_preparation import ModulePreparation, place_of, plain
from qtrain.callbacks.training_batches import first_batches, untracked
from qtrain.console import say
from qtrain.errors import ModelError
from qtrain.evaluation.progress import progress
from qtrain.modules.calibrate import calibrate, settle, start_weights, to_calibrate
from qtrain.modules.config import QuantizerSection
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.layer_options import explained, section_of
from qtrain.modules.prepare import Prepared
from qtrain.modules.quantizer import Quantizer
from qtrain.modules.quantizers import quantizers
from qtrain.modules.schedule import QuantizationSchedule, Stage
from qtrain.numerics.observers.observer import Observer
from qtrain.training.own_learning_rate import OwnLearningRate

Options = Mapping[str, Any] | QuantizerSection | None


class QuantizationAwareTraining(Callback):
    """Fake-quantizes the layers of a module before its optimizer is built; the module knows nothing of it.

        Trainer(callbacks=[QuantizationAwareTraining(weight={"format": "int4"}, activation={"format": "int8"})])

    Layers change their class in place (``qtrain.modules.prepare``), in ``setup``, or after the module's own ``setup``
    or ``configure_model`` where it builds its layers there. ``validate``, ``test`` and ``predict`` need the same
    callback; a checkpoint loaded without it says so. ``forward`` is not touched and nothing is converted when the fit
    ends: ``qtrain.modules.convert`` does that where it is wanted.

    Args:
        weight, activation: options of linears and convolutions (``qtrain.modules.config``), int4 and int8 unless it is
            said: ``{"format": "int4", "range": "learned", "calibrate": "mse"}``; None leaves that side as it is.
        pact: of the activations that replace ReLU modules; unsigned, with a trained bound, unless it is said.
        embedding: of embedding tables.
        kv_cache: of keys and values in transformers' decoders (``KVCacheSection``).
        rules, skip, first_last, head: see ``qtrain.modules.prepare.prepare_modules``; names as in the module.
        calibration_batches: training batches from which static and learned ranges of activations are chosen before the
            first step (with ``start_step``: the last ones before it).
        start_step, freeze_ranges_step, bits_schedule: see ``qtrain.modules.schedule.QuantizationSchedule``; steps are
            ``trainer.global_step``.
        scale_lr: learning rate of learned ranges and PACT's bounds, under the module's own schedule; default that of
            their group. Adam moves a scale by about its rate each step, however small the scale: at 0.01 scales of 0.03
            pass zero within a few steps.

    Raises:
        ModelError: nothing to quantize, a pattern that matches nothing, learned ranges that no optimizer has.
        CheckpointError: a checkpoint that was quantized with other options.
    """

    def __init__(
        self,
        *,
        weight: Options = None,
        activation: Options = None,
        pact: Options = None,
        embedding: Options = None,
        kv_cache: Mapping[str, Any] | KVCacheSection | None = None,
        rules: Mapping[str, Mapping[str, Any]] | None = None,
        skip: Sequence[str] = (),
        first_last: str | None = None,
        head: bool = False,
        calibration_batches: int = 8,
        start_step: int = 0,
        freeze_ranges_step: int | None = None,
        bits_schedule: Mapping[int, str | Mapping[str, str]] | None = None,
        scale_lr: float | None = None,
    ) -> None:
        given = {"weight": weight, "activation": activation, "pact": pact, "embedding": embedding}
        sections = {key: section_of(options, key) for key, options in given.items()}
        self.calibration_batches, self.scale_lr = calibration_batches, scale_lr
        self.schedule = QuantizationSchedule(start_step, freeze_ranges_step, bits_schedule or {}, calibration_batches)
        self.schedule.check_end({key: section.format for key, section in sections.items() if section is not None})
        self.preparation = ModulePreparation(
            made_by=type(self).__name__,
            sections=sections,
            kv_cache=explained(lambda: KVCacheSection.model_validate(kv_cache), "kv_cache") if kv_cache else None,
            rules={name: {key: plain(value) for key, value in rule.items()} for name, rule in (rules or {}).items()},
            skip=list(skip),
            first_last=first_last,
            head=head,
            schedule=self.schedule,
        )
        self._hooks = FollowedHooks()
        self._learning_rates: list[OwnLearningRate] = []
        self._observers: dict[Quantizer, Observer] = {}

    def prepare(self, module: nn.Module) -> Prepared:
        """Quantize the layers of ``module`` now, and let ``module.load_state_dict`` take checkpoints of this callback.

            module = Net()
            callback.prepare(module)
            module.load_state_dict(torch.load("last.ckpt", weights_only=True)["state_dict"])

        A second call changes nothing.

        Raises:
            ModelError: it was prepared with other options.
        """
        return self.preparation.prepare(module)

    def calibration_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Run one training batch for the ranges of activations: its training step; override where that will not do.

        Raises:
            ModelError: with manual optimization, for that would train.
        """
        if not pl_module.automatic_optimization:
            raise ModelError(
                "with manual optimization a training step takes optimizer steps, and cannot be run to calibrate",
                fix="override QuantizationAwareTraining.calibration_step, or activation={'range': 'dynamic', ...}",
            )
        arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, 0)
        pl_module.training_step(*arguments.values())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Quantize the module's layers as soon as it has them."""
        self._hooks.undo()
        self.preparation.watch(pl_module)
        # The callback's own hook is not asked for files of weights alone, and what it did others may replace.
        self._hooks.follow(
            pl_module,
            "on_save_checkpoint",
            lambda checkpoint: self.preparation.mark(pl_module, checkpoint["state_dict"]),
        )
        for hook in ("configure_model", "setup"):
            if is_overridden(hook, pl_module):
                return self._hooks.follow(pl_module, hook, lambda *args, **kwargs: self._prepare(pl_module))
        return self._prepare(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the schedule's place, and find ranges; here, for a validation may come before the first batch.

        Raises:
            ModelError: learned ranges that no optimizer has, or that DDP would wait for.
        """
        place = place_of(pl_module)
        stage = self.schedule.stage(place.step)
        self.schedule.apply(pl_module, stage, place.formats)
        self._observers = {}
        learned = _learned(pl_module)
        _check_optimizers(trainer, learned)
        _check_ddp(trainer, learned if self.schedule.start_step else {})
        if self.scale_lr is not None:
            self._learning_rates = [OwnLearningRate(one, learned.values(), self.scale_lr) for one in trainer.optimizers]
        if stage.on and not place.has_ranges and self.calibration_batches:
            self._calibrate(trainer, pl_module)
        _say(f"quantization-aware training from step {place.step}: {_summary(pl_module, stage)}")
        if self.schedule.moves:
            _log(trainer, stage, place.step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Be where the trainer is, whatever the checkpoint said."""
        self._advance(trainer, pl_module, row=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Shortly before quantization begins: look at the activations of this batch."""
        place = place_of(pl_module)
        if self.schedule.stage(place.step).observing and not place.has_ranges:
            for quantizer in to_calibrate(pl_module).values():
                if quantizer not in self._observers:
                    quantizer.observe()
                    assert quantizer.observer is not None
                    self._observers[quantizer] = quantizer.observer
                quantizer.observer = self._observers[quantizer]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Frozen ranges get no gradient: optimizers leave such parameters alone, decay and momentum included."""
        if self.schedule.stage(place_of(pl_module).step).frozen:
            for parameter in _learned(pl_module).values():
                parameter.grad = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the schedule. Here, so that checkpoints and validations after this step see its stage."""
        for quantizer in self._observers:
            quantizer.observer = None
        # The loop's own counter, as in Lightning's monitors, is still that of this step; the next is the first new one.
        self._advance(trainer, pl_module, row=trainer.fit_loop.epoch_loop._batches_that_stepped + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it if the schedule had more to come."""
        last = max(self.schedule.start_step, *self.schedule.bits, 0)
        if trainer.global_step < last:
            _say(f"warning: training ended at step {trainer.global_step}, and the schedule would go on to step {last}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimizers as they were."""
        for rate in self._learning_rates:
            rate.remove()
        self._learning_rates = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Name what the checkpoint needs."""
        self.preparation.mark(pl_module, checkpoint["state_dict"])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module's hooks as they were."""
        self._hooks.undo()

    def _prepare(self, pl_module: LightningModule) -> None:
        fresh = not place_of(pl_module).options
        prepared = self.prepare(pl_module)
        if fresh and prepared.notes:
            _say(prepared.notes)

    def _advance(self, trainer: Trainer, pl_module: LightningModule, row: int) -> None:
        place = place_of(pl_module)
        before, after = self.schedule.stage(place.step), self.schedule.stage(trainer.global_step)
        place.step = trainer.global_step
        if after == before:
            return
        self.schedule.apply(pl_module, after, place.formats)
        if after.on and not before.on and not place.has_ranges:
            start_weights(pl_module, again=True)  # training has moved them
            self._settle(trainer, pl_module)
        if lines := after.changes(before):
            _say(f"step {place.step}: {', '.join(lines)}")
            _log(trainer, after, row)

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for quantizer, observer in self._observers.items():
            quantizer.observer = observer
        settle({name: quantizer for name, quantizer in quantizers(pl_module) if quantizer in self._observers})
        self._observers = {}
        self._have_ranges(trainer, pl_module)

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not to_calibrate(pl_module):
            return
        with (
            first_batches(trainer, pl_module, self.calibration_batches) as batches,
            untracked(pl_module),
            trainer.precision_plugin.train_step_context(),
        ):
            shown = progress(batches, "calibrating activations", total=self.calibration_batches)
            calibrate(pl_module, shown, lambda batch: self.calibration_step(trainer, pl_module, batch))
        for module in pl_module.modules():
            if isinstance(module, Metric):
                module.reset()
        self._have_ranges(trainer, pl_module)

    def _have_ranges(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every process has seen batches of its own: all take the first one's ranges."""
        place_of(pl_module).has_ranges = True
        ranges = [one for quantizer in to_calibrate(pl_module).values() for one in quantizer.range_tensors()]
        kept = [one for one in ranges if one is not None]
        if kept and trainer.world_size > 1:
            flat: Tensor = trainer.strategy.broadcast(torch.cat([one.detach().flatten().cpu() for one in kept]))
            with torch.no_grad():
                for one, value in zip(kept, flat.split([one.numel() for one in kept]), strict=True):
                    one.copy_(value.view_as(one))


def _learned(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{key}": parameter
        for name, quantizer in quantizers(module)
        for key, parameter in quantizer.named_parameters(recurse=False)
        if parameter.requires_grad
    }


def _check_optimizers(trainer: Trainer, learned: Mapping[str, nn.Parameter]) -> None:
    optimized = {one for optimizer in trainer.optimizers for group in optimizer.param_groups for one in group["params"]}
    missing = [name for name, parameter in learned.items() if parameter not in optimized]
    if trainer.optimizers and missing:
        raise ModelError(
            f"{missing[0]} and {len(missing) - 1} more learned ranges are in no optimizer",
            rule="what is learned is trained",
            fix="configure_optimizers over self.parameters(), or skip=... those layers, or range=dynamic",
        )


def _check_ddp(trainer: Trainer, learned: Mapping[str, nn.Parameter]) -> None:
    strategy = trainer.strategy
    if learned and isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise ModelError(
            "start_step with learned ranges under DDP: until then they get no gradient, which DDP waits for",
            fix="Trainer(strategy='ddp_find_unused_parameters_true')",
        )


def _summary(module: nn.Module, stage: Stage) -> str:
    kinds = Counter(quantizer.spec.format for _, quantizer in quantizers(module) if quantizer.for_weight)
    inputs = Counter(quantizer.spec.format for _, quantizer in quantizers(module) if not quantizer.for_weight)
    parts = [
        f"{name} " + ", ".join(f"{format} x {count}" for format, count in counted.items())
        for name, counted in (("weights", kinds), ("activations", inputs))
        if counted
    ]
    return "; ".join(parts) + ("" if stage.on else "; full precision until quantization starts")


def _log(trainer: Trainer, stage: Stage, step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(stage.figures(), step=step)


@rank_zero_only
def _say(lines: str | list[str]) -> None:
    say(lines)
