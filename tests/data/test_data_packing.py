"""Packing and collating."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtrain.data.collate import collate_packed, collate_padded
from qtrain.data.packing import pack
from qtrain.data.sample import IGNORED, Sample, SampleStore

LENGTHS = st.lists(st.integers(1, 64), max_size=120)


def sample(length: int, first: int = 10) -> Sample:
    ids = list(range(first, first + length))
    return Sample(ids, [IGNORED, *ids[1:]])


@given(LENGTHS)
def test_every_sample_once_and_rows_hold(lengths: list[int]) -> None:
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
    assert rows == sorted(rows)
    assert rows == pack(lengths, 64)


@given(LENGTHS)
def test_no_two_rows_fit_into_one(lengths: list[int]) -> None:
    loads = sorted(sum(lengths[index] for index in row) for row in pack(lengths, 64))
    assert len(loads) < 2 or loads[0] + loads[1] > 64


def test_best_fit_takes_the_fullest_row_that_holds() -> None:
    assert pack([50, 40, 14, 24], 64) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("capacity", [512, 2048])
def test_rows_of_instruction_data_are_full(capacity: int) -> None:
    """Lengths as those of Alpaca under a chat template: median 162, nine tenths below 409."""
    draw = np.random.default_rng(0)
    lengths = [int(length) for length in np.clip(draw.lognormal(np.log(162), 0.72, 999), 47, min(capacity, 750))]
    assert sum(lengths) / (capacity * len(pack(lengths, capacity))) >= 0.95


def test_full_rows_keep_their_order() -> None:
    assert pack([8, 8, 8, 3], 8) == [[0], [1], [2], [3]]


def test_too_long() -> None:
    with pytest.raises(ValueError, match="sample 1 has 9 tokens, a row holds 8"):
        pack([8, 9], 8)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_packed_batch(lengths: list[list[int]]) -> None:
    rows = [[sample(length) for length in row] for row in lengths]
    batch = collate_packed(rows, pad=0, length=40)
    packed = any(len(row) > 1 for row in rows)
    width = 40 if packed else max(max(row) for row in lengths)
    assert batch["input_ids"].shape == batch["labels"].shape == (len(rows), width)
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["tokens"].dtype == torch.int64
    assert int(batch["tokens"]) == sum(map(sum, lengths))
    # The first token of each sample carries no loss, so nothing is predicted across documents.
    assert int(batch["loss_tokens"]) == sum(length - 1 for row in lengths for length in row)
    assert int(batch["loss_tokens"]) == int((batch["labels"] != IGNORED).sum())
    assert "attention_mask" not in batch
    if not packed and all(row == [width] for row in lengths):
        assert "position_ids" not in batch
        return
    for line, row in zip(batch["position_ids"].tolist(), lengths, strict=True):
        assert line == [place for part in (*row, width - sum(row)) for place in range(part)]
    assert (batch["input_ids"] == 0).sum() == batch["input_ids"].numel() - int(batch["tokens"])
    assert batch["labels"][batch["input_ids"] == 0].eq(IGNORED).all()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_padded_batch(lengths: list[int]) -> None:
    batch = collate_padded([[sample(length)] for length in lengths], pad=0)
    assert batch["input_ids"].shape == (len(lengths), max(lengths))
    assert ("attention_mask" in batch) == (min(lengths) < max(lengths))
    if "attention_mask" in batch:
        assert batch["attention_mask"].sum(1).tolist() == lengths
        assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 0)
    assert "position_ids" not in batch


@given(st.lists(st.lists(st.tuples(st.integers(0, 10**6), st.booleans()), min_size=1, max_size=9), max_size=9))
def test_store_gives_back_what_it_took(contents: list[list[tuple[int, bool]]]) -> None:
    samples = [
        Sample([token for token, _ in content], [token if kept else IGNORED for token, kept in content])
        for content in contents
    ]
    store = SampleStore(samples)
    assert [store[index] for index in range(len(store))] == samples
    assert store.lengths == [len(entry) for entry in samples]
    assert store.tokens == sum(store.lengths)
    assert store.loss_tokens == sum(entry.loss_tokens for entry in samples)


def test_checksum_sees_labels_and_borders() -> None:
    whole = SampleStore([Sample([1, 2], [IGNORED, 2]), Sample([3], [IGNORED])])
    masked = SampleStore([Sample([1, 2], [IGNORED, IGNORED]), Sample([3], [IGNORED])])
    moved = SampleStore([Sample([1], [IGNORED]), Sample([2, 3], [2, IGNORED])])
    assert len({whole.checksum(), masked.checksum(), moved.checksum()}) == 3
