"""Synthetic images in the four files of Fashion-MNIST: each class has a stripe of its own to learn."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as the format has it: magic number, big-endian sizes, values."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def striped(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright row whose height tells the class."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(count) % 10).astype(np.uint8)
    images = generator.integers(0, 60, (count, 28, 28)).astype(np.uint8)
    images[np.arange(count), 2 * labels.astype(int) + 4] = 250
    return images, labels


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """64 images to train on and 20 to test on, the training images packed."""
    directory = tmp_path / "fashion"
    directory.mkdir()
    arrays = (*striped(64, seed=1), *striped(20, seed=2))
    for name, array in zip(NAMES, arrays, strict=True):
        if name == NAMES[0]:
            (directory / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (directory / name).write_bytes(idx(array))
    return directory
