"""Batches of a fit before it begins, and training steps that leave no trace: for callbacks that measure first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from qtrain.training.random_state import random_state, set_random_state


@contextmanager
def first_batches(trainer: Trainer, pl_module: LightningModule, count: int) -> Iterator[Iterator[Any]]:
    """The first ``count`` training batches as the training step gets them; the fit begins with them anew.

    Loaders and random generators are left as if nobody had looked. Where there is nothing to train on there is none.
    """
    random = random_state()
    loop = trainer.fit_loop
    loop.setup_data()
    loader, fetcher = loop._combined_loader, loop._data_fetcher
    if loader is None or fetcher is None:
        yield iter(())
        return

    def batches() -> Iterator[Any]:
        for batch, _, _ in islice(iter(loader), count):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    try:
        yield batches()
    finally:
        set_random_state(random)
        # The fetcher holds the iterator of the first epoch, which has moved on: a new one, as for each later epoch.
        iter(fetcher)


@contextmanager
def untracked(pl_module: LightningModule) -> Iterator[None]:
    """Let a training step out of turn log nothing: outside its place in the loop Lightning refuses to."""
    silent = {"log": lambda *args, **kwargs: None, "log_dict": lambda *args, **kwargs: None}
    try:
        vars(pl_module).update(silent)
        yield
    finally:
        for name in silent:
            del vars(pl_module)[name]
