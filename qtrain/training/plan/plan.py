"""What a run will take, before any of its weights is loaded."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtrain.config.schema import Config
from qtrain.data.datamodule import LanguageData
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.modules.token_loss import ROWS
from qtrain.training.plan.changes import Change, Changes, Setting
from qtrain.training.plan.estimate import Estimator, dense_base_bytes
from qtrain.training.plan.step_memory import Peak, StepMemory
from qtrain.training.plan.steps import Steps, count_steps
from qtrain.training.recompute_budget import MARGIN, probe_batch

GIB, MIB = 2**30, 2**20
MEMINFO = Path("/proc/meminfo")
LIMITS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Plan:
    """Memory and steps of a run.

    Attributes:
        steps: their number and size.
        unknown: why the memory is not estimated; the following are None or empty then.
        memory: by part.
        level, count: of recomputation, and layers that run again.
        free: bytes on the device now.
        changes: that would fit, where the run does not.
        sixteen_bit: bytes of LoRA over 16-bit weights where that fits too, and the base is quantized.
        rows, length: of the micro-batch that was estimated.
        paged: bytes of optimizer state that lie where there is room, on the GPU or the host.
    """

    steps: Steps
    unknown: str | None = None
    memory: StepMemory | None = None
    level: str = "none"
    count: int = 0
    free: int = 0
    changes: tuple[Change, ...] = ()
    sixteen_bit: int | None = None
    rows: int = 0
    length: int = 0
    paged: int = 0

    @property
    def peak(self) -> Peak | None:
        """At the level of the run."""
        return None if self.memory is None else self.memory.at(self.level, self.count)

    @property
    def fits(self) -> bool | None:
        """Whether it does, with a margin for fragments."""
        return None if self.peak is None else self.peak.total <= room(self.free)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for plan.json and fit.json; bytes."""
        found: dict[str, Any] = {"steps": asdict(self.steps), "unknown": self.unknown}
        if self.memory is None or self.peak is None:
            return found
        return found | {
            "estimated_peak": self.peak.total,
            "moment": self.peak.moment,
            "parts": dict(self.parts()),
            "recompute": self.level,
            "levels": self.memory.levels(),
            "micro_batch": [self.rows, self.length],
            "free": self.free,
            "fits": self.fits,
            "changes": [asdict(change) for change in self.changes],
            "lora_over_16_bits": self.sixteen_bit,
        }

    def parts(self) -> Iterator[tuple[str, int]]:
        """What the total is made of."""
        memory, peak = self.memory, self.peak
        assert memory is not None and peak is not None
        yield "base weights", memory.base
        yield "trained", memory.trained
        yield "gradients", peak.gradients + memory.copies
        yield "optimizer", memory.optimizer
        yield "activations", peak.activations
        yield "at work", peak.working
        yield "teacher", memory.teacher
        yield "inputs and workspace", memory.inputs + memory.workspace


def room(free: int) -> int:
    """Of free bytes, those that a step may take; the rest is for fragments and other libraries."""
    return int(free * (1 - MARGIN))


def make_plan(config: Config, data: LanguageData, device: torch.device, processes: int = 1) -> Plan:
    """Of a run on data that has been set up.

    Args:
        device: that trains; what is free there is asked now, so before the model is on it.
        processes: that train together, a device each.
    """
    steps = count_steps(data.summary.splits["train"], config.data.batch_size, config.trainer, processes)
    free = free_memory(device)
    try:
        return _with_memory(config, data, device, processes, steps, free)
    except Exception as error:  # models run code of their own on shapes alone: what it raises must stop no run
        return Plan(steps, unknown=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    finally:
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _with_memory(
    config: Config, data: LanguageData, device: torch.device, processes: int, steps: Steps, free: int
) -> Plan:
    estimator = Estimator(config, device, processes)
    batch = largest_batch(config, data)
    accumulate = int(config.trainer.get("accumulate_grad_batches", 1))
    memory = estimator.step(batch, config.optimizer, accumulates=accumulate > 1)
    level, count = _level(config, memory, free, processes)
    rows, length = batch["input_ids"].shape
    setting = Setting(config.data.batch_size, length, accumulate, level, config.optimizer.name)
    fits = memory.at(level, count).total <= room(free)
    changes = [] if fits else Changes(config, estimator, batch, setting, room(free)).find()
    paged = estimator.paged_bytes(config.optimizer)
    del estimator
    sixteen = None
    if fits and isinstance(config.method, QLoraOptions) and config.method.base in ("nf4", "fp4", "int8"):
        needed = memory.at(level, count).total - memory.base - memory.workspace + dense_base_bytes(config, device)
        sixteen = needed if needed <= room(free) else None
    return Plan(
        steps,
        memory=memory,
        level=level,
        count=count,
        free=free,
        changes=tuple(changes),
        sixteen_bit=sixteen,
        rows=rows,
        length=length,
        paged=paged,
    )


def _level(config: Config, memory: StepMemory, free: int, processes: int) -> tuple[str, int]:
    """The level that is asked for; of ``auto`` the fewest layers that fit where ``settle`` measures one, else none."""
    asked = config.run.recompute
    if asked == "auto":
        sharded = processes > 1 and config.trainer.get("strategy") == "fsdp2"
        measured = memory.on_gpu and not sharded and not config.run.cuda_graphs
        found = memory.fewest(room(free)) if measured else ("none", 0)
        return found or ("offload", memory.layers)
    return asked, {"none": 0, "selective": (memory.layers + 1) // 2}.get(asked, memory.layers)


def largest_batch(config: Config, data: LanguageData) -> Mapping[str, Tensor]:
    """The micro-batch of the longest rows, as the loader would make it; of a stream one of whole rows."""
    size = config.data.batch_size
    if config.data.streaming:
        batch = probe_batch(size, config.data.max_length, 2, packing=config.data.packing, device=torch.device("cpu"))
        return batch | {"labels": batch["input_ids"]}
    rows = data.numbered_rows("train")
    numbers = rows.lengths.argsort()[::-1][:size].tolist()
    return {key: tensor for key, tensor in rows.batch(numbers).items() if key != ROWS}


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU; on the host, within the limit of a container too."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _available()
    try:
        limit = int((LIMITS / "memory.max").read_text())
        used = int((LIMITS / "memory.current").read_text())
        cached = dict(line.split() for line in (LIMITS / "memory.stat").read_text().splitlines())
        return min(available, limit - used + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError):  # no limit, or none that is told so
        return available


def _available() -> int:
    try:
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
