"""Several processes that train one model: started together, counted, and agreed on what they train."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from subprocess import Popen
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor, distributed, nn

from qtrain.console import out
from qtrain.errors import ConfigError, ModelError

T = TypeVar("T")
_children: list[Popen[Any]] = []


def started_by(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """(devices, nodes) of the processes that torchrun, srun or mpirun has started; None where nobody has."""
    for world, local in (
        ("WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ):
        if world in environ:
            size = int(environ[world])
            # SLURM writes 4(x2) for two nodes with 4 tasks each
            devices = min(size, int(environ.get(local, str(size)).split("(")[0].split(",")[0]))
            return devices, size // devices
    return None


def asked_for(trainer: Mapping[str, Any]) -> int | None:
    """Processes by ``trainer.devices`` and ``trainer.num_nodes``; None where devices are left to the machine."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, str):
        if devices.strip() in ("auto", "-1"):
            return None
        devices = int(devices) if devices.strip().isdecimal() else [part for part in devices.split(",") if part]
    count = len(devices) if isinstance(devices, list) else int(devices)
    return None if count < 0 else count * int(trainer.get("num_nodes", 1))


def join(trainer: L.Trainer, module: L.LightningModule, section: Mapping[str, Any]) -> None:
    """Start the other processes of ``trainer``, if it has any, and meet them: from here on each of them runs.

    Lightning would start them in ``trainer.fit``, when one process has prepared everything by itself. What ranks above
    0 say on stdout is not shown.

    Args:
        section: ``trainer.*``.

    Raises:
        ConfigError: another number of processes would train than was asked for, or than was started.
    """
    global _children
    _check_count(trainer, asked_for(section))
    if trainer.world_size == 1:
        return
    launcher = trainer.strategy.launcher
    if launcher is not None and not isinstance(launcher, _SubprocessScriptLauncher):
        raise ConfigError(
            f"{type(launcher).__name__.lstrip('_')} forks this process",
            rule="every process starts from the command line",
            fix="trainer.strategy=ddp",
        )
    trainer.strategy.connect(module)
    if launcher is not None:
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
        _children = launcher.procs
    else:
        trainer.strategy.setup_environment()
    if size() != trainer.world_size:
        raise ConfigError(f"{size()} processes met, {trainer.world_size} were expected", fix="start all of them anew")
    out.quiet = rank() > 0


@contextmanager
def end_together() -> Iterator[None]:
    """Where the block, or the function that this decorates, fails, the processes that ``join`` started end as well."""
    try:
        yield
    except BaseException as error:
        if rank() and not _children and isinstance(error, Exception):
            # Rank 0, where it failed with the same, tells of it and ends this one: had this one ended first, Lightning
            # would kill rank 0.
            time.sleep(5)
        children = _children.copy()
        _children.clear()  # the list that Lightning watches
        for process in children:
            process.kill()  # it would wait for this one, or complain that it is gone; a SIGTERM it would broadcast
        raise


def _check_count(trainer: L.Trainer, asked: int | None) -> None:
    started = started_by(os.environ)
    for what, count in (
        ("trainer.devices x trainer.num_nodes", asked),
        ("what was started", started and started[0] * started[1]),
    ):
        if count is not None and count != trainer.world_size:
            devices, nodes = started or (count, 1)
            raise ConfigError(
                f"{trainer.world_size} processes would train together, and {what} is {count}",
                rule="as many processes train as the config asks for, and as were started",
                fix=f"trainer.devices={devices} trainer.num_nodes={nodes}",
            )


def rank() -> int:
    """Of this process among those that train together."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """How many train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait() -> None:
    """Until every process is here, however long one of them quantizes."""
    if size() > 1:
        distributed.barrier(_words())


@contextmanager
def one_after_zero(apart: bool) -> Iterator[None]:
    """With ``apart``, rank 0 runs the block first, and the others when it is through; else all at once."""
    if apart and rank():
        wait()
    yield
    if apart and not rank():
        wait()


def seed_apart(seed: int) -> None:
    """Random numbers of its own for each rank above 0, as dropout wants them; rank 0 keeps its state."""
    if rank():
        L.seed_everything((seed + 1_000_003 * rank()) % 2**32, verbose=False)


def gather(content: T) -> list[T]:
    """``content`` of each rank, in each of them."""
    if size() == 1:
        return [content]
    found: list[Any] = [None] * size()
    distributed.all_gather_object(found, content, _words())
    return found


def agree(model: nn.Module) -> int:
    """Where a tensor of the state differs between ranks, each takes that of rank 0; how many did.

    Processes that prepare a model by themselves come to the same weights, codes and scales, but a GPU's sums need not
    be the same in every last bit, and a code is a rounded sum.

    Raises:
        ModelError: names, shapes, or something that is no tensor of the model, differ.
    """
    if size() == 1:
        return 0
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    different = _different(state)
    for name in different:
        distributed.broadcast(state[name], 0)
    left = _different({name: model.state_dict()[name] for name in different})
    if left:
        raise ModelError(
            f"{left[0]} is not the same in all processes",
            rule="every process trains the same model",
            fix="the same versions, files and kind of GPU in all of them",
        )
    return len(different)


def checksum(tensor: Tensor) -> int:
    """CRC-32 of its bytes."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def _different(state: Mapping[str, Tensor]) -> list[str]:
    every = gather({name: (tuple(value.shape), str(value.dtype), checksum(value)) for name, value in state.items()})
    first = every[0]
    if any(other.keys() != first.keys() or any(other[n][:2] != first[n][:2] for n in first) for other in every):
        raise ModelError("the processes prepared different models", fix="the same config and versions in all of them")
    return [name for name in first if any(other[name] != first[name] for other in every)]


@cache
def _words() -> Any:
    """A group on the host for what is no gradient; a start that calibrates on rank 0 may take hours."""
    return distributed.new_group(backend="gloo", timeout=timedelta(days=2))
