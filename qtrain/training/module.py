"""The LightningModule: a causal language model, quantized and trained as the config says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtrain.config.schema import Config
from qtrain.console import say
from qtrain.data.datamodule import LanguageData
from qtrain.data.isolation import check_isolation
from qtrain.distill.cached import CachedLogits
from qtrain.distill.config import LayerwiseSection
from qtrain.distill.divergence import Objective
from qtrain.distill.layerwise import distill_layerwise
from qtrain.distill.teacher import Teacher, teacher_model
from qtrain.distill.token_loss import choose_cached, choose_online
from qtrain.errors import ModelError
from qtrain.methods.base import load_for
from qtrain.methods.method import Context, Progress, build_method
from qtrain.models.dtype import resolve_dtypes
from qtrain.models.fingerprint import fingerprint
from qtrain.models.fused import fuse_layers
from qtrain.models.load import load_model, load_tokenizer
from qtrain.models.packed import load_packed
from qtrain.models.source import find_model
from qtrain.modules.block_chain import BlockError
from qtrain.modules.head import head_factors
from qtrain.modules.quantizers import full_precision, quantizers
from qtrain.modules.token_loss import Loss, choose_loss
from qtrain.training.attention import Attention, shape_of
from qtrain.training.cuda_graphs import LayerGraphs
from qtrain.training.gradients import (
    EarlyClip,
    OnHost,
    clip_,
    early_clip,
    gradients_of,
    scale_,
    steps_are_read,
)
from qtrain.training.optimizers import build_optimizer, build_schedule
from qtrain.training.rate_factors import with_factors
from qtrain.training.recompute import Recompute
from qtrain.training.recompute_budget import settle
from qtrain.training.recompute_retry import AccumulationWindow
from qtrain.training.sharding import ShardedStrategy, as_forward, local, shard
from qtrain.training.teacher_cache import cached_logits, training_rows


class LanguageModule(L.LightningModule):
    """Trains ``model.path`` by ``method.*``; logs ``train/loss``, ``train/lr``, ``val/loss`` and ``val/perplexity``.

    The loss of a batch is a sum over tokens; the gradients of an accumulation window are divided by the window's
    number of tokens over all ranks, so that 1 x 8 and 4 x 2 rows give the same step however long the rows are.

    Args:
        config: a resolved config, from ``qtrain.load_recipe``.
        base: a model to use in place of loading ``model.path``.
        tokenizer: likewise.
        progress: wraps the loop over layers while the base is quantized.
        packed: directory of a packed base that takes the place of quantizing one, as RUN/base holds it.
        scratch: directory from which a long preparation goes on when it was stopped.
        restoring: what was trained will be loaded, from a checkpoint or a run, so that no starting point is needed.
    """

    strict_loading = False  # checkpoints hold what trains; the base comes from model.path

    def __init__(
        self,
        config: Config,
        *,
        base: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        progress: Progress | None = None,
        packed: Path | None = None,
        scratch: Path | None = None,
        restoring: bool = False,
    ) -> None:
        super().__init__()
        config.distill.check_streaming(config.data.streaming)
        self.config = config
        self.method = build_method(config.method)
        self.model: nn.Module | None = None
        self.loss_path = self.fused = ""
        self.loading: str | None = None
        self.blocks: str | None = None
        self._base, self._tokenizer, self._progress = base, tokenizer, progress
        self._packed, self._scratch, self._restoring = packed, scratch, restoring
        self._loss: Loss | None = None
        self._objective: Loss | None = None  # of the training: the loss, or the divergence from a teacher
        self._window: AccumulationWindow | None = None
        self._clip: EarlyClip | None = None
        self._sums: OnHost | None = None  # of a step: loss and tokens
        self._read = True  # each step's loss is, by a logger or a bar
        self._validation: list[Tensor] = []
        self._twin: Teacher | None = None
        self.graphs: LayerGraphs | None = None  # of decoder layers, from the first batch on
        self._clones: list[RemovableHandle] = []
        self.cache: CachedLogits | None = None
        self.recompute: Recompute | None = None
        self.attention: Attention | None = None
        self._in_order = ExitStack()
        self.block_errors: list[BlockError] = []

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model; loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config.model)
        return self._tokenizer

    @property
    def base_fingerprint(self) -> str | None:
        """Which base the checkpoint belongs to."""
        return (
            fingerprint(find_model(self.config.model), self.config.model.revision) if self.config.model.path else None
        )

    @property
    def teacher(self) -> Teacher | None:
        """The full-precision model beside this one, where there is one."""
        return self._twin

    def read_packed(self, directory: Path) -> None:
        """Take the packed base there instead of quantizing one."""
        self._packed = directory

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep a share of the weights in each process of ``mesh``; to be called once ranges are found."""
        assert self.model is not None and self.recompute is not None
        assert self._loss is not None and self._objective is not None
        plain = self.method.plain_model(self.model)
        shard(plain, self.recompute.layers, mesh)
        self._loss = as_forward(plain, "held_out_loss", self._loss)
        self._objective = as_forward(plain, "objective", self._objective)

    def configure_model(self) -> None:
        """Load, quantize, add what trains: once, on the device of the strategy."""
        if self.model is not None:
            return
        if self._trainer is None:
            self.build(torch.device("cpu"))
            return
        data = getattr(self.trainer, "datamodule", None)
        self.build(self.trainer.strategy.root_device, data if isinstance(data, LanguageData) else None)

    def build(self, device: torch.device, data: LanguageData | None = None) -> nn.Module:
        """The prepared model on ``device``; also for use without a Trainer.

        Args:
            data: what it will be trained on, where ``distill.teacher_logits=cached`` or a starting point looks at it.
        """
        config = self.config
        storage, compute = resolve_dtypes(config.model.dtype, config.method.compute_dtype, device)
        handed_over, self._base = self._base, None
        base = handed_over if handed_over is not None else self._load_base(storage, compute, device)
        self.fused = fuse_layers(base, device, config.model.fused, keeps_outputs=self.method.keeps_outputs)
        self.attention = Attention(base, config, device, compute)
        section = config.distill
        if section.layerwise is not None or (section.loss != "none" and not section.cached):
            self._twin = self._teacher(base, compute, device)
        if section.cached:
            self.cache = cached_logits(
                config,
                training_rows(config, data, handed_over=handed_over is not None),
                lambda: self._twin or self._teacher(base, compute, device),
                world_size=self.trainer.world_size if self._trainer is not None else 1,
            )
        L.seed_everything(config.run.seed, verbose=False)  # the adapters' start is the same however long loading took
        text = None if data is None else partial(data.rows, "train")
        self.model = self.method.prepare(
            base,
            compute_dtype=compute,
            device=device,
            progress=self._progress,
            text=text,
            scratch=self._scratch,
            restoring=self._restoring,
        )
        # Lightning keeps the mode that modules are in: loaded ones are in eval, without dropout and recomputation.
        self.model.train()
        plain = self.method.plain_model(self.model)
        # Ranges that calibration will find are not there yet, and what is looked at here does not depend on them.
        unready = any(not quantizer.ready for _, quantizer in quantizers(plain))
        context = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=compute == torch.bfloat16)
        with full_precision(plain) if unready else nullcontext(), context():
            self.blocks = None if unready else self.method.fuse(self.model, context)
            self._loss, self.loss_path = choose_loss(plain)
            self._objective = self._loss
            if section.loss != "none":
                objective = Objective(section.loss, section.temperature, section.ce_weight, section.jsd_beta)
                if self.cache is not None:
                    self._objective, self.loss_path = choose_cached(plain, self.cache, objective, head_factors)
                elif self._twin is not None:
                    self._objective, self.loss_path = choose_online(plain, self._twin, objective, head_factors)
            self.attention.prove(plain, int(plain.config.vocab_size))
            if config.data.packing:
                check_isolation(plain, int(plain.config.vocab_size))
            if config.model.attention == "auto" and (shape := shape_of(plain, config)) is not None:
                self.attention.measure(shape, compute, device)
            longest = None if data is None or config.data.streaming else partial(_longest, data)
            sharded = self._trainer is not None and isinstance(self.trainer.strategy, ShardedStrategy)
            self.recompute = settle(plain, config, device, self.loss_path, longest=longest, sharded=sharded)
        return self.model

    def calibrate(self, rows: Sequence[Tensor]) -> None:
        """Find the ranges that the method keeps, from rows of token ids [batch, tokens]."""
        assert self.model is not None
        config, device = self.config, next(self.model.parameters()).device
        _, compute = resolve_dtypes(config.model.dtype, config.method.compute_dtype, device)
        context = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=compute == torch.bfloat16)
        progress = self._progress or (lambda items, total: items)
        self.method.calibrate(self.model, rows[: getattr(config.method, "calibration_rows", 0)], context, progress)
        if self.blocks is None:  # they are compared with their layers, which needs ranges
            self.blocks = self.method.fuse(self.model, context)
        if config.distill.layerwise is not None:
            self._distill_blocks(config.distill.layerwise, rows, context, progress)

    def _distill_blocks(
        self, section: LayerwiseSection, rows: Sequence[Tensor], context: Context, progress: Progress
    ) -> None:
        """Each block learns to answer as its full-precision twin, on what the quantized blocks before it give."""
        assert self._twin is not None and self.model is not None
        longest = max((row.shape[1] for row in rows), default=0)
        whole = [row for row in rows if row.shape[1] == longest][: section.rows]
        device = self._twin.device
        self.block_errors = distill_layerwise(
            self._twin.model,
            self.method.plain_model(self.model),
            torch.cat(whole).to(device) if whole else torch.empty(0, 0, dtype=torch.long),
            steps=section.steps,
            lr=section.lr,
            batch_size=section.batch_size,
            prefix="student",
            groups=self.method.parameter_groups,
            context=context,
            seed=self.config.run.seed,
            progress=progress,
        )
        self.model.train()

    def _load_base(self, storage: torch.dtype, compute: torch.dtype, device: torch.device) -> PreTrainedModel:
        if self._packed is not None:
            return load_packed(self._packed, storage, attention=self.config.model.attention)
        distill = self.config.distill
        taught = distill.teacher is None and (distill.layerwise is not None or distill.loss != "none")
        found = load_for(
            self.method,
            self.config.model,
            storage,
            compute_dtype=compute,
            device=device,
            whole="the teacher is model.path in full precision" if taught else None,
        )
        self.loading = found.loading
        return found.model

    def _teacher(self, base: PreTrainedModel, compute: torch.dtype, device: torch.device) -> Teacher:
        """The full-precision twin on ``device``.

        Raises:
            ModelError: ``model.path`` holds codes, so that nothing here is in full precision.
        """
        if self.config.method.keeps_codes and self.config.distill.teacher is None:
            raise ModelError(
                "the teacher would be the student: model.path holds the codes that are trained over",
                where="distill.teacher",
                rule="without one, a teacher is model.path in full precision",
                fix="distill.teacher=THE_MODEL_THE_CODES_WERE_MADE_FROM",
            )
        if self._packed is not None and self.config.distill.teacher is None:
            base = load_model(self.config.model, compute)
        model = teacher_model(self.config.distill, base, self.config.model, compute)
        fuse_layers(model, device, self.config.model.fused)
        context = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=compute == torch.bfloat16)
        return Teacher(model, context).to(device)

    def on_fit_start(self) -> None:
        """Let go of what was needed before the first step: a teacher of blocks, the weights before a start."""
        assert self._objective is not None and self.recompute is not None and self.attention is not None
        self._in_order.enter_context(self.attention.in_order())
        self._window = AccumulationWindow(
            self._objective,
            self.recompute,
            self.parameters,
            self.trainer.precision_plugin.train_step_context,
            lambda: self.trainer.accumulate_grad_batches,
            alone=self.trainer.world_size == 1,
        )
        self._read = steps_are_read(self.trainer)
        if isinstance(self.trainer.strategy.model, DistributedDataParallel):
            # No step changes a buffer, and packed zero points are buffers: DDP would send them all before each forward.
            self.trainer.strategy.model.broadcast_buffers = False
        self.method.drop_baselines()
        if self.config.distill.cached or self.config.distill.loss == "none":
            self._twin = None

    def forward(self, **inputs: Any) -> Any:
        """The transformers model's output."""
        assert self.model is not None
        return self.model(**inputs)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Summed loss of one micro-batch, in nats."""
        assert self._window is not None
        if self.config.run.cuda_graphs and self.graphs is None:
            self._capture_layers(batch)
        return self._window.forward(batch)

    def _capture_layers(self, batch: Mapping[str, Tensor]) -> None:
        """Decoder layers, of the teacher too, become CUDA graphs for batches like this one."""
        assert self.model is not None and self._objective is not None
        models = [self.method.plain_model(self.model), *([self._twin.model] if self._twin else [])]
        self.graphs = LayerGraphs()
        with self.trainer.precision_plugin.train_step_context():
            self.graphs.try_to_capture(models, partial(self._objective, batch), self.device)
        say([f"graphs      {self.graphs}"])
        if self.graphs.count and self.trainer.accumulate_grad_batches > 1:
            # A graph writes its gradients where it wrote them before, and there autograd would accumulate them.
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            self._clones = [parameter.register_hook(torch.clone) for parameter in trained]

    def on_fit_end(self) -> None:
        """Layers run as they are again."""
        self._in_order.close()
        if self.graphs is not None:
            if self.graphs.count:
                replayed, others = self.graphs.calls
                say([f"graphs      {replayed:,} calls of layers replayed, {others:,} not: evaluation, other shapes"])
            self.graphs.release()
        for clone in self._clones:
            clone.remove()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Its gradients; where memory runs out in the first steps, by a lower level of recomputation."""
        assert self._window is not None
        self._window.backward(loss)
        self._clip = early_clip(self.trainer) if self._window.means else None

    def on_after_backward(self) -> None:
        """Send the sums of a step to the host, where its gradients are means already."""
        assert self._window is not None
        if self._window.means:
            self._sums = OnHost(self._window.close(), asked=self._read, since=self._window.since)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the window's sum of gradients into the gradient of the mean over its tokens, if it is not that yet."""
        assert self._window is not None
        if not self._window.means:
            total = self._window.close()
            world = self.trainer.world_size
            if world > 1:
                total = torch.as_tensor(self.all_gather(total)).view(world, 2).sum(0)
            self._sums = OnHost(total, asked=self._read)
            # Lightning divided each loss by the number of micro-batches, and DDP averages over ranks: both undone here.
            scale = (self.trainer.accumulate_grad_batches * world / total[1].clamp(min=1)).float()
            scale_([local(gradient) for gradient in gradients_of(optimizer)], scale)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, let go of the gradients, which Lightning would keep through the next forward pass, and log."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad(set_to_none=True)
        assert self._sums is not None
        loss, tokens = self._sums.get()  # once the optimizer is launched: backward and it run while the host goes on
        # Tensors of the host's where each is read: of a GPU's a logger would wait for the optimizer too.
        self.log("train/loss", (loss / tokens.clamp(min=1)).float(), prog_bar=True)
        self.log("train/lr", torch.tensor(float(optimizer.param_groups[0]["lr"])))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm, or by value; Lightning refuses to under bf16 with a fused AdamW, which could undo a scaler."""
        if gradient_clip_val:
            clip_(optimizer, gradient_clip_val, by_value=gradient_clip_algorithm == "value", early=self._clip)

    def on_validation_epoch_start(self) -> None:
        """Start the held-out sum."""
        self._validation.clear()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add one batch to the held-out sum."""
        assert self._loss is not None
        loss = self._loss(batch)
        self._validation.append(torch.stack((loss.double(), batch["loss_tokens"].to(loss.device).double())))

    def on_validation_epoch_end(self) -> None:
        """Held-out loss: the mean over all tokens (not over batches), and its exponential."""
        self._log_held_out("val")

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self._validation.clear()

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """As for validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As for validation, as ``test/*``."""
        self._log_held_out("test")

    def _log_held_out(self, split: str) -> None:
        total = torch.stack(self._validation).sum(0)
        if self.trainer.world_size > 1:
            total = torch.as_tensor(self.all_gather(total)).view(-1, 2).sum(0)
        loss = float(total[0] / total[1].clamp(min=1))
        self.log(f"{split}/loss", loss, prog_bar=True)
        self.log(f"{split}/perplexity", math.exp(min(loss, 80.0)))
        self.log(f"{split}/tokens", float(total[1]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on what trains, and the schedule over the steps that the trainer expects."""
        assert self.model is not None
        section = self.config.optimizer
        groups = self.method.parameter_groups(self.model, section.lr)
        named = self.method.plain_model(self.model).named_parameters()
        groups = with_factors(groups, named, section.lr_factors)
        optimizer = build_optimizer(groups, section, seed=self.config.run.seed)
        total = float(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(optimizer, section, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _longest(data: LanguageData) -> int:
    return int(data.numbered_rows("train").lengths.max())
