"""Rows by number: what a batch says of its rows is what lies in them, whatever the order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qtrain.data.collate import collate_packed
from qtrain.data.config import DataSection
from qtrain.data.datamodule import LanguageData
from qtrain.data.numbered_rows import NumberedRows
from qtrain.data.packing import pack
from qtrain.data.sample import Sample, SampleStore
from qtrain.errors import DataError


def numbered(lengths: list[int], capacity: int = 9) -> NumberedRows:
    ids = [list(range(10 * index, 10 * index + length)) for index, length in enumerate(lengths)]
    store = SampleStore(Sample(line, [-100, *line[1:]]) for line in ids)
    return NumberedRows(store, pack(lengths, capacity), lambda rows: collate_packed(rows, pad=3, length=capacity))


@given(st.lists(st.integers(2, 9), min_size=1, max_size=30), st.data())
def test_lengths_and_batches_by_number(lengths: list[int], data: st.DataObject) -> None:
    rows = numbered(lengths)
    assert rows.lengths.tolist() == [sum(lengths[index] for index in row) for row in rows.rows]
    number = data.draw(st.integers(0, len(rows) - 1))
    batch = rows.batch([number, 0], [True, False])
    assert batch["rows"].tolist() == [number, 0]
    assert int(batch["loss_tokens"]) == sum(lengths[index] - 1 for index in rows.rows[number])
    assert batch["input_ids"][0, : lengths[rows.rows[number][0]]].tolist() == rows.store[rows.rows[number][0]].input_ids


def test_the_checksum_is_of_the_packing_too() -> None:
    rows = numbered([4, 5, 4, 5])
    assert rows.rows == [[0, 3], [1, 2]]
    others = ([[0, 1], [2, 3]], [[1, 2], [0, 3]], [[0], [1, 2, 3]], [[0], [1], [2], [3]])
    found = {replace(rows, rows=other).checksum() for other in (rows.rows, *others)}
    assert len(found) == 5 and rows.checksum() == numbered([4, 5, 4, 5]).checksum() != numbered([4, 5, 4, 6]).checksum()


@pytest.mark.parametrize("workers", [0, 1])
def test_shuffled_batches_carry_their_numbers(
    workers: int, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    section = DataSection(train=str(tmp_path / "text.txt"), max_length=16, batch_size=3, workers=workers)
    data = LanguageData(section, tiny_tokenizer, seed=4)
    data.setup("fit")
    rows, seen = data.numbered_rows("train"), []
    for batch in data.train_dataloader():
        moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
        assert moved["rows"].device.type == "cpu" and moved["input_ids"].device.type == "meta"
        # Which labels count was found before they were sent: a tensor on meta could not tell.
        assert moved["kept"].shape == ((batch["labels"][:, 1:] != -100).sum(),)
        assert torch.equal(batch["input_ids"], rows.batch(batch["rows"].tolist())["input_ids"])
        seen += batch["rows"].tolist()
    assert sorted(seen) == list(range(len(rows))) != seen
    with pytest.raises(DataError, match="data.validation"):
        data.numbered_rows("validation")
