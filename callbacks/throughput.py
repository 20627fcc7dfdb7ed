"""How fast training goes and how much memory it takes."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from qtrain.callbacks.periods import check_period
from qtrain.evaluation.flops import flops_per_token, peak_flops


class Throughput(Callback):
    """Logs ``throughput/{tokens_per_second, samples_per_second, step_seconds, peak_gib, mfu}`` every few steps.

    Rates are those of the whole job over all processes. The clock runs from batch to batch, data loading included,
    and stands still in validation. MFU = tokens/s x FLOPs a token / (peak FLOP/s x devices), see
    :func:`qtrain.evaluation.flops.flops_per_token`; it is logged where the device's peak is known.

    Args:
        every_n_steps: optimizer steps in a measurement, however many batches each accumulates. The device is waited
            for once a measurement, not once a step.
        warmup_steps: optimizer steps before the first measurement: allocators and compilers settle in them.
    """

    def __init__(self, every_n_steps: int = 10, warmup_steps: int = 3) -> None:
        check_period(self, every_n_steps)
        self.every_n_steps, self.warmup_steps = every_n_steps, warmup_steps
        self.peak_gib: float | None = None
        self._tokens_rates: list[float] = []
        self._samples_rates: list[float] = []
        self._step_seconds: list[float] = []
        self._mfus: list[float] = []
        self._first_step = 0
        self._running_since: float | None = None
        self._reset(0)

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the measurements; None before the first one or where batches have no tokens."""
        return statistics.median(self._tokens_rates) if self._tokens_rates else None

    @property
    def samples_per_second(self) -> float | None:
        """Median over the measurements; None before the first one."""
        return statistics.median(self._samples_rates) if self._samples_rates else None

    @property
    def step_seconds(self) -> float | None:
        """Median over the measurements, of one optimizer step; None before the first one."""
        return statistics.median(self._step_seconds) if self._step_seconds else None

    @property
    def mfu(self) -> float | None:
        """Median over the measurements; None where the device's peak is not known."""
        return statistics.median(self._mfus) if self._mfus else None

    def tokens(self, batch: Any) -> int | Tensor:
        """Non-pad tokens of a batch; override for batches of another make. 0 means unknown.

        Read from ``batch["tokens"]`` (summed) if there is one, else the sum of a 2-d ``attention_mask``, else the
        number of elements of ``input_ids``, else of ``labels``. A bare tensor, or the first of a tuple, counts as
        ``input_ids`` if it holds integers. A tensor is not waited for.
        """
        if not isinstance(batch, Mapping):
            ids = _first_tensor(batch)
            return 0 if ids is None or ids.is_floating_point() else ids.numel()
        if (tokens := batch.get("tokens")) is not None:
            return tokens.sum() if isinstance(tokens, Tensor) else int(tokens)
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask.sum()
        return next((batch[key].numel() for key in ("input_ids", "labels") if key in batch), 0)

    def samples(self, batch: Any) -> int | Tensor:
        """Samples of a batch: ``batch["samples"]`` (packed rows hold several) if there is one, else its rows."""
        if isinstance(batch, Mapping) and (samples := batch.get("samples")) is not None:
            return samples.sum() if isinstance(samples, Tensor) else int(samples)
        rows = _first_tensor(batch)
        return 0 if rows is None or not rows.dim() else len(rows)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew; weights may have been swapped until now."""
        self._tokens_rates, self._samples_rates, self._step_seconds, self._mfus = [], [], [], []
        self.peak_gib = None
        self._flops_per_token = flops_per_token(pl_module)
        self._peak_flops = peak_flops(pl_module.device)
        self._first_step = trainer.global_step + self.warmup_steps
        self._reset(self._first_step)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock where it stands."""
        if self._running_since is None and trainer.global_step >= self._first_step:
            _wait(pl_module.device)
            self._running_since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; close the measurement after ``every_n_steps`` optimizer steps."""
        if self._running_since is None:
            return
        self._counted_tokens += self.tokens(batch)
        self._counted_samples += self.samples(batch)
        if trainer.global_step >= self._measured_from + self.every_n_steps:
            self._measure(trainer, pl_module)
            self._running_since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next training batch."""
        self._pause(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what is left of a run that is shorter than one measurement."""
        if not self._samples_rates and trainer.global_step > self._measured_from:
            self._measure(trainer, pl_module)
        self.peak_gib = _peak_gib(pl_module.device)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause(pl_module)
        counts = torch.tensor([float(self._counted_tokens), float(self._counted_samples)], device=pl_module.device)
        tokens, samples = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self.peak_gib = _peak_gib(pl_module.device)
        rates = {
            "samples_per_second": samples / self._seconds,
            "step_seconds": self._seconds / (trainer.global_step - self._measured_from),
            "peak_gib": self.peak_gib,
        }
        self._samples_rates.append(rates["samples_per_second"])
        self._step_seconds.append(rates["step_seconds"])
        if tokens:
            rates["tokens_per_second"] = tokens / self._seconds
            self._tokens_rates.append(rates["tokens_per_second"])
        if tokens and self._peak_flops:
            flops = rates["tokens_per_second"] * self._flops_per_token
            rates["mfu"] = flops / (self._peak_flops * trainer.world_size)
            self._mfus.append(rates["mfu"])
        for logger in trainer.loggers:
            # The loop's own counter, as in Lightning's monitors: the row that holds this step's loss. Through
            # `pl_module.log` a value would be lost unless the step is a multiple of `log_every_n_steps`.
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            logger.log_metrics({f"throughput/{name}": value for name, value in rates.items()}, step=step)
        self._reset(trainer.global_step)

    def _pause(self, pl_module: LightningModule) -> None:
        if self._running_since is not None:
            _wait(pl_module.device)
            self._seconds += time.perf_counter() - self._running_since
            self._running_since = None

    def _reset(self, step: int) -> None:
        self._measured_from = step
        self._running_since = None
        self._seconds = 0.0
        self._counted_tokens: int | Tensor = 0
        self._counted_samples: int | Tensor = 0


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return None
    return next((item for item in batch if isinstance(item, Tensor)), None)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_gib(device: torch.device) -> float:
    """Most memory that tensors took on a CUDA device since training began; else the process' peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
