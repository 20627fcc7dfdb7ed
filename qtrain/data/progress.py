"""Where Lightning stands in the training data, and two of its slips at the end of an epoch put right."""

from __future__ import annotations

import lightning


class Progress:
    """Lightning's own counters: they alone know what was trained on, whatever was fetched ahead or cut by a limit.

    ``processed`` rises before ``on_train_batch_end``, where checkpoints are saved, and is what it restores.
    """

    def __init__(self, trainer: lightning.Trainer) -> None:
        self._trainer = trainer
        self._batches = trainer.fit_loop.epoch_loop.batch_progress.current

    def __call__(self) -> tuple[int, int]:
        """The epoch, and how many of its batches have been trained on."""
        # Lightning annotates the tracker with a parent class that lacks `processed`.
        return self._trainer.current_epoch, self._batches.processed  # type: ignore[attr-defined]

    def recount(self, batches: int) -> None:
        """The same place in the epoch, where batches have another size than those that were counted."""
        by = batches - self()[1]
        self._batches.ready += by
        self._batches.started += by  # type: ignore[attr-defined]
        self._batches.processed += by  # type: ignore[attr-defined]
        self._batches.completed += by


def settle_epoch(trainer: lightning.Trainer, *, sized: bool) -> None:
    """Make the counters of a checkpoint that was saved at the end of an epoch mean what they say (Lightning 2.6.6).

    - Saved in ``on_train_epoch_end`` and resumed under ``max_steps``, the epoch is counted twice, and where there is
      validation the next step is logged as the one after it.
    - Saved after the last batch of a loader without length, the epoch after it is passed over.

    Call it when the loops are restored and have not begun to run: from ``train_dataloader``.
    """
    epochs, batches = trainer.fit_loop.epoch_progress, trainer.fit_loop.epoch_loop.batch_progress
    processed: int = epochs.current.processed  # type: ignore[attr-defined]
    if epochs.current.ready == processed == epochs.current.completed + 1:
        for tracker in (epochs.current, epochs.total):
            tracker.completed += 1
        batches.reset_on_run()
        if sized:
            trainer.fit_loop.epoch_loop.restarting = False  # the next epoch starts like any other
    if not sized and not isinstance(trainer.limit_train_batches, int):
        batches.is_last_batch = False
