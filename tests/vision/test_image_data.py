"""Batches are the images of the files, in an order that seed and epoch decide, from which a run goes on."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qtrain.errors import CheckpointError, DataError
from qtrain.vision.batches import PADDING, EvaluationBatches, Images, Normalization, TrainingBatches
from qtrain.vision.config import VisionDataSection
from qtrain.vision.datamodule import ImageData


def data(path: Path, *, seed: int = 0, **keys: object) -> ImageData:
    section = VisionDataSection.model_validate({"path": str(path), "batch_size": 8, **keys})
    module = ImageData(section, seed=seed)
    module.setup("fit")
    return module


def epoch(batches: TrainingBatches | EvaluationBatches) -> tuple[Tensor, Tensor]:
    found = list(batches)
    assert len(found) == len(batches)
    return torch.cat([b["image"] for b in found]), torch.cat([b["label"] for b in found])


def numbered(count: int, **keys: object) -> TrainingBatches:
    """Images that hold their own number in the middle, so that a batch tells which they are."""
    pixels = torch.zeros(count, 8, 8, dtype=torch.uint8)
    pixels[:, 4, 4] = torch.arange(count, dtype=torch.uint8) + 1
    settings: dict[str, object] = {"batch_size": 4, "augment": False, "seed": 0, **keys}
    return TrainingBatches(Images(pixels, torch.arange(count)), Normalization(0, 1), **settings)  # type: ignore[arg-type]


def test_splits_hold_every_image_once(fashion: Path) -> None:
    module = data(fashion, validation_share=0.25)
    assert module.summary() == {"train": {"samples": 48}, "validation": {"samples": 16}, "test": {"samples": 20}}
    parts = [module.splits[name].pixels for name in ("train", "validation")]
    assert len(torch.cat(parts).flatten(1).unique(dim=0)) == 64
    other = data(fashion, seed=5, validation_share=0.25)
    assert torch.equal(other.splits["validation"].pixels, parts[1])
    assert "validation" not in data(fashion, validation_share=0).splits


def test_batches_are_normalized(fashion: Path) -> None:
    images, _ = epoch(data(fashion, augment=False, validation_share=0).train_dataloader())
    assert images.shape == (64, 1, 28, 28) and images.dtype == torch.float32
    assert abs(float(images.mean())) < 1e-5
    assert float(images.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_evaluation_keeps_order_and_the_last_batch(fashion: Path) -> None:
    module = data(fashion, eval_batch_size=7)
    _, labels = epoch(module.test_dataloader())
    assert torch.equal(labels, torch.arange(20) % 10)


def test_an_epoch_holds_each_image_once_and_the_next_another_order() -> None:
    batches = numbered(30)
    first, second = epoch(batches)[1], epoch(batches)[1]
    assert len(first) == 28  # the batch that is not full is left out
    assert len(first.unique()) == len(second.unique()) == 28
    assert not torch.equal(first, second)


def test_labels_stay_with_their_images() -> None:
    for augment in (False, True):
        images, labels = epoch(numbered(32, augment=augment))
        assert torch.equal(images.amax((1, 2, 3)), labels + 1.0)


def test_crops_and_flips_reach_every_place_and_no_other() -> None:
    batches = numbered(32, augment=True)
    places = set()
    for _ in range(40):
        images, _ = epoch(batches)
        places |= {(row, column) for _, _, row, column in images.nonzero().tolist()}
    around = range(4 - PADDING, 4 + PADDING + 1)
    mirrored = {7 - column for column in around}
    assert places == {(row, column) for row in around for column in {*around, *mirrored}}


@pytest.mark.parametrize("augment", [False, True])
def test_seed_decides(fashion: Path, augment: bool) -> None:
    first, again, other = (epoch(data(fashion, seed=seed, augment=augment).train_dataloader())[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_ranks_share_an_epoch() -> None:
    shares = [epoch(numbered(32, rank=rank, world_size=2))[1] for rank in (0, 1)]
    assert sorted(torch.cat(shares).tolist()) == list(range(32))


def test_it_goes_on_in_the_middle_of_an_epoch() -> None:
    straight = numbered(32, augment=True)
    batches = [*straight, *straight]
    cut = numbered(32, augment=True)
    places = [cut.state_dict() for _, _ in zip(range(11), (b for _ in range(2) for b in cut), strict=False)]
    resumed = numbered(32, augment=True)
    resumed.load_state_dict(places[-1])
    rest = list(resumed)
    assert len(rest) == 16 - 11
    for one, two in zip(rest, batches[11:], strict=True):
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["label"], two["label"])
    with pytest.raises(CheckpointError, match="within a batch of 5"):
        numbered(32, augment=True, batch_size=5).load_state_dict(places[-1])


def rewritten(path: Path, array: np.ndarray) -> None:
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_data_that_cannot_be_trained_on(fashion: Path) -> None:
    with pytest.raises(DataError, match="make no batch of 80"):
        data(fashion, batch_size=80)
    with pytest.raises(DataError, match="of which 0 are held out"):
        data(fashion, validation_share=0.001)
    rewritten(fashion / "train-labels-idx1-ubyte", np.arange(64, dtype=np.uint8))
    with pytest.raises(DataError, match="a label 63"):
        data(fashion)
    rewritten(fashion / "train-labels-idx1-ubyte", np.zeros(63, np.uint8))
    with pytest.raises(DataError, match="63 labels for 64 images"):
        data(fashion)
    rewritten(fashion / "t10k-images-idx3-ubyte", np.zeros((0, 28, 28), np.uint8))
    rewritten(fashion / "t10k-labels-idx1-ubyte", np.zeros(0, np.uint8))
    rewritten(fashion / "train-labels-idx1-ubyte", np.zeros(64, np.uint8))
    with pytest.raises(DataError, match="no images"):
        data(fashion)
