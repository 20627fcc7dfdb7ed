"""Batches cut out of image tensors that lie on the device: no worker, no copy, a few kernels a batch."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qtrain.data.loader import ResumableLoader
from qtrain.data.progress import Progress

Batch = dict[str, Tensor]
"""``image`` [B, 1, H, W] in fp32 with mean 0 and deviation 1 over the training images, ``label`` [B]."""

PADDING = 2
"""Pixels around the 28 x 28 of MNIST and its successors, which are padded to 32 x 32 as a rule."""


@dataclass(frozen=True)
class Images:
    """Images of a split as they are stored: ``pixels`` uint8 [N, H, W], ``labels`` int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def checksum(self) -> int:
        """Of all pixels and labels."""
        return zlib.crc32(self.labels.cpu().numpy().data, zlib.crc32(self.pixels.cpu().numpy().data))


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of the training images' pixels, which lie in 0..255."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, pixels: Tensor) -> Normalization:
        """Counted exactly, by value."""
        counts = torch.bincount(pixels.flatten(), minlength=256).double()
        values = torch.arange(256, dtype=torch.float64, device=pixels.device)
        mean = float((counts * values).sum() / counts.sum())
        variance = float((counts * (values - mean).square()).sum() / counts.sum())
        return cls(mean, max(variance, 1.0) ** 0.5)  # images of one colour have no deviation

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W] → fp32 [B, 1, H, W]."""
        return pixels.unsqueeze(1).float().sub_(self.mean).div_(self.deviation)


class TrainingBatches(ResumableLoader):
    """Shuffled batches; order, crops and flips are functions of (seed, epoch), the same on every device.

    A last batch that is not full is left out: those images come earlier in another epoch. With several ranks each
    takes its own batches.

    Args:
        images: on the device where the batches are wanted.
        augment: random crops of the padded image, half of them flipped left to right.
    """

    def __init__(
        self,
        images: Images,
        normalization: Normalization,
        *,
        batch_size: int,
        augment: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        progress: Progress | None = None,
    ) -> None:
        identity = {"seed": seed, "augment": int(augment), "images": len(images), "checksum": images.checksum()}
        super().__init__(identity, batch_size * world_size, progress)
        self._normalization, self._labels = normalization, images.labels
        self._height, self._width = images.pixels.shape[1:]
        self._padding = PADDING if augment else 0
        self._pixels = functional.pad(images.pixels, (self._padding,) * 4)
        self._batch_size, self._augment, self._seed = batch_size, augment, seed
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return len(self._labels) // (self._batch_size * self._world_size)

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        generator = np.random.default_rng([self._seed, epoch])
        count, device = len(self._labels), self._labels.device
        order = torch.from_numpy(generator.permutation(count)).to(device)
        corners = torch.from_numpy(generator.integers(0, 2 * self._padding, (2, count), endpoint=True)).to(device)
        flips = torch.from_numpy(generator.integers(0, int(self._augment), count, endpoint=True)).to(device)
        rows, columns = (torch.arange(size, device=device) for size in (self._height, self._width))
        for number in range(first, len(self)):
            start = (number * self._world_size + self._rank) * self._batch_size
            part = slice(start, start + self._batch_size)
            chosen, (top, left), flip = order[part, None, None], corners[:, part, None], flips[part, None]
            across = torch.where(flip == 1, columns.flip(0), columns)
            pixels = self._pixels[chosen, (top + rows)[:, :, None], (left + across)[:, None, :]]
            yield {"image": self._normalization(pixels), "label": self._labels[order[part]]}


class EvaluationBatches:
    """All images in their order; each rank goes through all of them, so that their means are exact."""

    def __init__(self, images: Images, normalization: Normalization, *, batch_size: int) -> None:
        self._images, self._normalization, self._batch_size = images, normalization, batch_size

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._images), self._batch_size):
            part = slice(start, start + self._batch_size)
            yield {"image": self._normalization(self._images.pixels[part]), "label": self._images.labels[part]}
