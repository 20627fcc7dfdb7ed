"""Token shards as training data: written whole, checked bit by bit, read without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from qtrain.data.config import DataSection
from qtrain.data.datamodule import LanguageData
from qtrain.data.sample import IGNORED, Sample, SampleStore
from qtrain.data.sources import TokenDirectory, check_sources, locate
from qtrain.data.tokens.manifest import Manifest, Origin, has_manifest, read_manifest
from qtrain.data.tokens.shards import ShardWriter, read_shards
from qtrain.errors import CheckpointError, DataError

LENGTH = 12


def manifest(tokenizer_size: int, **origin: Any) -> Manifest:
    facts = {"model": "abc", "length": LENGTH, "shard_rows": 4, "seed": 0, "options": {"top_k": 50}}
    return Manifest(
        model_path="some/model", dtype="uint16", origin=Origin(tokenizer_size=tokenizer_size, **facts | origin)
    )


def ids(rows: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(4, 300, (rows, LENGTH))


@pytest.fixture
def directory(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Shards of 4, 4 and 2 rows."""
    path = tmp_path / "tokens"
    writer = ShardWriter(path, manifest(len(tiny_tokenizer)))
    for number, rows in writer.pending(10):
        writer.write(number, ids(10)[4 * number : 4 * number + rows])
    writer.finish({"rows": 10})
    return path


def train_rows(section: DataSection, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, torch.Tensor]]:
    data = LanguageData(section, tokenizer)
    data.setup("fit")
    return list(data.train_dataloader())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def test_what_is_written_is_read(directory: Path) -> None:
    found = read_manifest(directory)
    assert [(shard.file, shard.rows) for shard in found.shards] == [
        ("tokens-00000.npy", 4),
        ("tokens-00001.npy", 4),
        ("tokens-00002.npy", 2),
    ]
    shards = list(read_shards(directory, found))
    assert {shard.dtype for shard in shards} == {np.dtype("uint16")}
    assert np.array_equal(np.concatenate(shards), ids(10))
    assert not list(directory.glob(".*")), "no temporary file stays"


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, manifest(200_000).model_copy(update={"dtype": "uint32"}))
    writer.write(0, np.full((2, LENGTH), 150_000))
    (shard,) = read_shards(tmp_path, writer.manifest)
    assert shard.dtype == np.uint32 and (shard == 150_000).all()


def test_only_what_is_missing_or_damaged_is_pending(directory: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def pending(rows: int) -> list[tuple[int, int]]:
        return ShardWriter(directory, manifest(len(tiny_tokenizer))).pending(rows)

    assert pending(10) == pending(9) == []
    assert pending(15) == [(2, 4), (3, 3)], "the last shard grows"
    flip(directory / "tokens-00001.npy")
    assert pending(10) == [(1, 4)]
    (directory / "tokens-00000.npy").unlink()
    assert pending(8) == [(0, 4), (1, 4)]


def test_a_written_shard_takes_the_place_of_the_old_one(
    directory: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    writer = ShardWriter(directory, manifest(len(tiny_tokenizer)))
    writer.write(1, ids(4, seed=1), entropy=2.5)
    assert not read_manifest(directory).complete
    assert [shard.rows for shard in writer.manifest.shards] == [4, 4, 2]
    assert np.array_equal(list(read_shards(directory, writer.manifest))[1], ids(4, seed=1))


@pytest.mark.parametrize(
    "change,words",
    [
        ({"seed": 1}, "seed is 0, not 1"),
        ({"model": "def"}, "model is abc, not def"),
        ({"options": {"top_k": 20}}, "top_k is 50, not 20"),
        ({"length": 13, "shard_rows": 5}, "length is 12, not 13; shard_rows is 4, not 5"),
    ],
)
def test_shards_of_another_origin_are_left_alone(
    directory: Path, tiny_tokenizer: PreTrainedTokenizerFast, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words) as error:
        ShardWriter(directory, manifest(len(tiny_tokenizer), **change))
    assert "generate_data.dir=ANOTHER" in str(error.value)


def test_a_flipped_bit_is_found(directory: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    flip(directory / "tokens-00001.npy")
    with pytest.raises(DataError, match="SHA-256") as error:
        train_rows(DataSection(train=str(directory)), tiny_tokenizer)
    assert "tokens-00001.npy" in str(error.value) and f"generate_data.dir={directory}" in str(error.value)


def test_a_missing_shard_is_named(directory: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (directory / "tokens-00002.npy").unlink()
    with pytest.raises(DataError, match=r"tokens-00002\.npy: the manifest names"):
        train_rows(DataSection(train=str(directory)), tiny_tokenizer)


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    writer = ShardWriter(tmp_path, manifest(49_152))
    writer.write(0, ids(4))
    writer.finish({})
    with pytest.raises(DataError, match=f"49152 entries .some/model., the model's has {len(tiny_tokenizer)}"):
        train_rows(DataSection(train=str(tmp_path)), tiny_tokenizer)


def test_a_set_that_is_not_complete_is_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ShardWriter(tmp_path, manifest(len(tiny_tokenizer))).write(0, ids(4))
    (error,) = check_sources(DataSection(train=str(tmp_path)))
    assert f"data.train={tmp_path}: the token shards are not complete" in str(error)
    with pytest.raises(DataError, match="not complete"):
        train_rows(DataSection(train=str(tmp_path)), tiny_tokenizer)


def test_a_manifest_of_another_version_is_refused(directory: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(DataError, match="version"):
        train_rows(DataSection(train=str(directory)), tiny_tokenizer)


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_the_ids_and_their_labels(
    directory: Path, tiny_tokenizer: PreTrainedTokenizerFast, packing: bool
) -> None:
    section = DataSection(train=str(directory), max_length=LENGTH, batch_size=5, shuffle=False, packing=packing)
    batches = train_rows(section, tiny_tokenizer)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), torch.from_numpy(ids(10)))
    for batch in batches:
        assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])
        assert (batch["labels"][:, 0] == IGNORED).all()
        assert "position_ids" not in batch and "attention_mask" not in batch


def test_shorter_rows_are_packed_only_if_asked(directory: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    section = DataSection(train=str(directory), max_length=2 * LENGTH + 1, batch_size=10, shuffle=False)
    (batch,) = train_rows(section, tiny_tokenizer)
    assert batch["input_ids"].shape == (5, 25) and "position_ids" in batch
    assert int(batch["loss_tokens"]) == 10 * (LENGTH - 1)
    (batch,) = train_rows(section.model_copy(update={"packing": False}), tiny_tokenizer)
    assert batch["input_ids"].shape == (10, LENGTH)


@pytest.mark.parametrize("size,parts", [(8, [8, 4]), (11, [11]), (12, [12])])
def test_longer_rows_are_cut(
    directory: Path, tiny_tokenizer: PreTrainedTokenizerFast, size: int, parts: list[int]
) -> None:
    data = LanguageData(DataSection(train=str(directory), max_length=size, packing=False), tiny_tokenizer)
    data.setup("fit")
    samples = data.samples("train", 10**6)
    assert [len(sample) for sample in samples] == parts * 10
    assert samples[0].input_ids == ids(10)[0, : parts[0]].tolist()
    assert samples[-1].input_ids == ids(10)[-1, sum(parts[:-1]) : sum(parts)].tolist()
    summary = data.summary.splits["train"]
    assert summary.split_documents == (10 if size < LENGTH else 0)
    assert summary.length_max == LENGTH and summary.tokens == 10 * sum(parts)


def test_text_beside_shards(directory: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("The quick brown fox jumps over the lazy dog.")
    (tmp_path / "pair.jsonl").write_text(json.dumps({"prompt": "The dog?", "completion": "Sleeps."}) + "\n")
    assert locate(str(directory)) == [TokenDirectory(directory)]
    section = DataSection(
        train=[str(directory), str(tmp_path / "notes.txt")], validation=str(tmp_path / "pair.jsonl"), max_length=64
    )
    assert check_sources(section) == []
    data = LanguageData(section, tiny_tokenizer)
    data.setup("fit")
    assert data.summary.splits["train"].samples == 11
    assert data.summary.splits["validation"].template is not None
    # A format that is named holds for the texts; shards are shards.
    named = DataSection(train=str(directory), validation=str(tmp_path / "pair.jsonl"), format="prompt_completion")
    assert check_sources(named) == []
    LanguageData(named, tiny_tokenizer).setup("fit")


def test_the_format_by_name(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("The quick brown fox")
    assert check_sources(DataSection(train=str(directory), format="tokens")) == []
    (error,) = check_sources(DataSection(train=str(directory), validation=str(tmp_path / "notes.txt"), format="tokens"))
    assert "data.validation=" in str(error) and "no token shards" in str(error) and "data.format=auto" in str(error)


def test_mistakes_are_told_before_anything_is_read(directory: Path) -> None:
    (error,) = check_sources(DataSection(predict=str(directory)))
    assert "no prompts" in str(error)
    (error,) = check_sources(DataSection(train=str(directory), streaming=True))
    assert "data.streaming=false" in str(error)
    (error,) = check_sources(DataSection(train=str(directory.parent)))
    assert f"name that one: {directory}" in str(error)


def test_the_manifest_of_another_program_is_a_data_file(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps([{"text": "hello"}]))
    assert not has_manifest(tmp_path)
    assert locate(str(tmp_path)) == [tmp_path / "manifest.json"]
    (tmp_path / "manifest.json").write_text("{")
    assert not has_manifest(tmp_path)


def test_a_resumed_run_knows_its_shards_again(
    directory: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def loader(source: Path) -> Any:
        data = LanguageData(DataSection(train=str(source), max_length=LENGTH), tiny_tokenizer)
        data.setup("fit")
        return data.train_dataloader()

    state = loader(directory).state_dict()
    loader(directory).load_state_dict(state)
    writer = ShardWriter(tmp_path / "other", manifest(len(tiny_tokenizer)))
    writer.write(0, ids(10, seed=1))
    writer.finish({})
    with pytest.raises(CheckpointError, match="checksum"):
        loader(tmp_path / "other").load_state_dict(state)


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6), max_size=8))
def test_extending_a_store_is_appending_each(rows: list[list[int]]) -> None:
    samples = [Sample(row, [IGNORED, *row[1:]]) for row in rows]
    one, other = SampleStore(samples[:2]), SampleStore(samples[:2])
    for sample in samples:
        one.append(sample)
    flat = [token for row in rows for token in row]
    other.extend(np.array(flat, dtype=np.uint32), np.array([len(row) for row in rows], dtype=np.int64))
    assert list(one) == list(other)
    assert one.checksum() == other.checksum() and one.loss_tokens == other.loss_tokens
