"""The Lightning data module: idx files in, batches on the device out."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn

from qtrain.data.progress import Progress, settle_epoch
from qtrain.errors import DataError
from qtrain.vision.batches import EvaluationBatches, Images, Normalization, TrainingBatches
from qtrain.vision.config import VisionDataSection
from qtrain.vision.files import SplitFiles, find_files
from qtrain.vision.idx import read_idx


class ImageData(L.LightningDataModule):
    """Fashion-MNIST, or what lies in the same files: ``train`` less ``validation_share`` of it, and ``test``.

    The held-out images are the same whatever the seed. Splits lie on the device as bytes, 47 MB for Fashion-MNIST.

    Args:
        section: the `data.*` keys.
        classes: labels are below it.
        seed: of order, crops and flips.

    Errors: DataError, from ``setup``, for files that cannot be trained on.
    """

    def __init__(self, section: VisionDataSection, *, classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        self.section, self.classes, self.seed = section, classes, seed
        self.splits: dict[str, Images] = {}
        self._normalization: Normalization | None = None
        if not section.validation_share:
            # Lightning validates if this hook is overridden, and warns about a hook that returns no loader.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    def setup(self, stage: str | None = None) -> None:
        """Read all splits, once."""
        if self.splits:
            return
        found = {split: _read(files, self.classes) for split, files in find_files(self.section.path).items()}
        whole, test = found["train"], found["test"]
        order = np.random.default_rng(0).permutation(len(whole))
        held = round(self.section.validation_share * len(whole))
        parts = {"train": np.sort(order[held:]), "validation": np.sort(order[:held])}
        if len(parts["train"]) < self.section.batch_size or (self.section.validation_share and not held):
            raise DataError(
                f"{len(whole)} images, of which {held} are held out, make no batch of {self.section.batch_size}",
                where=f"data.path={self.section.path}",
                rule="at least one whole batch to train on, and one image to validate on if any",
                fix="a smaller data.batch_size, or another data.validation_share",
            )
        splits = {name: Images(whole.pixels[part], whole.labels[part]) for name, part in parts.items() if len(part)}
        self.splits = splits | {"test": test}
        self._normalization = Normalization.of(splits["train"].pixels)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Images in each split."""
        return {name: {"samples": len(images)} for name, images in self.splits.items()}

    def train_dataloader(self) -> TrainingBatches:
        """Batches in an order decided by (seed, epoch); resumable in the middle of an epoch."""
        assert self._normalization is not None
        progress = None
        if self.trainer and self.trainer.state.fn == TrainerFn.FITTING:
            settle_epoch(self.trainer, sized=True)
            progress = Progress(self.trainer)
        return TrainingBatches(
            self.splits["train"].to(self._device),
            self._normalization,
            batch_size=self.section.batch_size,
            augment=self.section.augment,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            progress=progress,
        )

    def val_dataloader(self) -> EvaluationBatches:
        """The held-out images."""
        return self._evaluation("validation")

    def test_dataloader(self) -> EvaluationBatches:
        """The test images."""
        return self._evaluation("test")

    def _evaluation(self, split: str) -> EvaluationBatches:
        assert self._normalization is not None
        images = self.splits[split].to(self._device)
        return EvaluationBatches(images, self._normalization, batch_size=self.section.eval_batch_size)

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")


def _read(files: SplitFiles, classes: int) -> Images:
    pixels, labels = read_idx(files.images, 3), read_idx(files.labels, 1)
    if len(pixels) != len(labels):
        raise DataError(f"{len(labels)} labels for {len(pixels)} images", where=str(files.labels))
    if not len(labels):
        raise DataError("no images", where=str(files.images))
    if labels.max() >= classes:
        raise DataError(
            f"a label {labels.max()}", where=str(files.labels), rule=f"labels are below model.classes={classes}"
        )
    # Arrays over the bytes of a file cannot be written to, which torch warns about.
    return Images(torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64)))
