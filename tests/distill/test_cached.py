"""Teacher logits in files: written once, taken up again after a kill, refused where they do not belong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qtrain.distill import chunked_loss
from qtrain.distill.cached import CachedLogits, CacheKey
from qtrain.distill.write_cache import write_cache
from qtrain.errors import DataError

KEY = CacheKey("ab12", 77, top_k=5, temperature=2.0)
LENGTHS = [3, 9, 1, 6, 4, 8, 2, 5, 7, 3]
ROWS = [torch.arange(length) + 10 * number for number, length in enumerate(LENGTHS)]


class FakeTeacher:
    """Logits that are a function of the ids; counts the rows it was asked for."""

    def __init__(self, vocab: int = 40) -> None:
        self.table = torch.randn(120, vocab, generator=torch.Generator().manual_seed(0))
        self.rows: list[int] = []

    def __call__(self, rows: list[Tensor]) -> Iterator[Tensor]:
        for ids in rows:
            self.rows.append(int(ids[0]) // 10)
            yield self.table[ids]


def write(directory: Path, teacher: Any, **options: Any) -> CachedLogits:
    return write_cache(directory, ROWS, teacher, KEY, **{"batch_size": 2, "rows_per_shard": 3, **options})


@pytest.fixture
def cache(tmp_path: Path) -> CachedLogits:
    return write(tmp_path / "cache", FakeTeacher())


def expected(number: int, vocab: int = 40) -> tuple[Tensor, Tensor]:
    log_probs = (FakeTeacher(vocab).table[ROWS[number]] / KEY.temperature).log_softmax(-1)
    values, ids = log_probs.topk(min(KEY.top_k, vocab))
    return ids, values


@pytest.mark.parametrize("chunk_bytes", [chunked_loss.CHUNK_BYTES, 1])
def test_rows_come_back(tmp_path: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", chunk_bytes)
    cache = write(tmp_path, FakeTeacher())
    assert (len(cache), cache.vocab, cache.top_k) == (10, 40, 5)
    order = [7, 0, 9, 1, 7]
    ids, log_probs = cache.rows(order)
    assert ids.shape == log_probs.shape == (5, 9, 5)
    assert (ids.dtype, log_probs.dtype) == (torch.int32, torch.float16)
    for place, number in enumerate(order):
        length = LENGTHS[number]
        right_ids, right_values = expected(number)
        assert torch.equal(ids[place, :length].long(), right_ids)
        torch.testing.assert_close(log_probs[place, :length].float(), right_values, rtol=2**-11, atol=0)
        assert not ids[place, length:].any() and not log_probs[place, length:].any()
    assert cache.rows([2], length=20)[0].shape == (1, 20, 5)


def test_ids_take_two_bytes_where_the_vocabulary_lets_them(tmp_path: Path, cache: CachedLogits) -> None:
    small = load_file(cache.directory / "logits-00000.safetensors")
    assert {name: tensor.dtype for name, tensor in small.items()} == {
        "ids": torch.uint16,
        "log_probs": torch.float16,
        "ends": torch.int64,
    }

    def logits(rows: list[Tensor]) -> Iterable[Tensor]:
        return [torch.arange(70_000.0).expand(len(ids), -1) / 1e4 for ids in rows]

    large = write_cache(tmp_path / "large", ROWS[:2], logits, KEY)
    assert load_file(large.directory / "logits-00000.safetensors")["ids"].dtype == torch.int32
    assert large.rows([1])[0][0, 0].tolist() == [69_999, 69_998, 69_997, 69_996, 69_995]


def test_a_vocabulary_smaller_than_k(tmp_path: Path) -> None:
    cache = write(tmp_path, FakeTeacher(vocab=4))
    assert cache.top_k == 4
    assert torch.equal(cache.rows([3])[0][0].long(), expected(3, 4)[0])


class Stopped(Exception):
    pass


def stops_after(rows: int) -> Any:
    teacher = FakeTeacher()

    def logits(batch: list[Tensor]) -> Iterator[Tensor]:
        for row in teacher(batch):
            if len(teacher.rows) > rows:
                raise Stopped
            yield row

    return logits


def test_a_stopped_writer_goes_on(tmp_path: Path, cache: CachedLogits) -> None:
    directory = tmp_path / "stopped"
    with pytest.raises(Stopped):
        write(directory, stops_after(7))
    assert sorted(path.name for path in directory.iterdir()) == [
        "logits-00000.safetensors",
        "logits-00001.safetensors",
        "unfinished.json",
    ]
    with pytest.raises(DataError, match=r"no complete cache.*\n.*goes on where it was"):
        CachedLogits(directory, KEY)
    teacher = FakeTeacher()
    write(directory, teacher)
    assert teacher.rows == [6, 7, 8, 9]
    assert files(directory) == files(cache.directory)


def test_a_killed_process_leaves_complete_shards_alone(tmp_path: Path, cache: CachedLogits) -> None:
    # As SIGKILL does: no exception, no clean-up, here in the middle of writing the third file.
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_cached as t
from qtrain.distill import write_cache as module
whole = module.save_file
def half(tensors, path):
    if {{*tensors}} and os.path.exists({str(tmp_path / "killed" / "logits-00001.safetensors")!r}):
        path.write_bytes(b"half of a shard")
        os._exit(9)
    whole(tensors, path)
module.save_file = half
t.write(t.Path({str(tmp_path / "killed")!r}), t.FakeTeacher())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 9, result.stderr
    directory = tmp_path / "killed"
    assert len(list(directory.glob(".*.tmp"))) == 1 and not (directory / "manifest.json").exists()
    teacher = FakeTeacher()
    write(directory, teacher)
    assert teacher.rows == [6, 7, 8, 9]
    assert files(directory) == files(cache.directory)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_finished_cache_is_not_computed_again(cache: CachedLogits) -> None:
    before, teacher = files(cache.directory), FakeTeacher()
    write(cache.directory, teacher)
    write(cache.directory, teacher, rows_per_shard=7)
    assert teacher.rows == [] and files(cache.directory) == before


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("place", [3, -1, -60])
def test_a_flipped_bit_is_named_and_only_that_shard_written_again(cache: CachedLogits, place: int) -> None:
    before = files(cache.directory)
    path = cache.directory / "logits-00002.safetensors"
    flip(path, place)
    fresh = CachedLogits(cache.directory, KEY)
    fresh.rows([0, 5])
    with pytest.raises(DataError, match=r"logits-00002.safetensors is damaged\n.*SHA-256.*\n.*remove logits-00002"):
        fresh.rows([0, 7])
    path.unlink()
    with pytest.raises(DataError, match="logits-00002.safetensors is missing"):
        fresh.rows([7])
    teacher = FakeTeacher()
    write(cache.directory, teacher)
    assert teacher.rows == [6, 7, 8] and files(cache.directory) == before


def test_a_bit_flipped_while_the_writer_was_stopped(tmp_path: Path, cache: CachedLogits) -> None:
    directory = tmp_path / "stopped"
    with pytest.raises(Stopped):
        write(directory, stops_after(7))
    flip(directory / "logits-00000.safetensors", -1)
    teacher = FakeTeacher()
    write(directory, teacher)
    assert teacher.rows == [0, 1, 2, 6, 7, 8, 9] and files(directory) == files(cache.directory)


def test_shards_of_another_size_give_way(tmp_path: Path, cache: CachedLogits) -> None:
    directory = tmp_path / "stopped"
    with pytest.raises(Stopped):
        write(directory, stops_after(9), rows_per_shard=2)
    write(directory, FakeTeacher())
    assert files(directory) == files(cache.directory)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (replace(KEY, fingerprint="cd34"), "another teacher: fingerprint is 'ab12' there, 'cd34' here"),
        (replace(KEY, checksum=78), "other training rows: checksum is 77 there, 78 here"),
        (replace(KEY, top_k=6), "another distill.top_k: top_k is 5 there, 6 here"),
        (replace(KEY, temperature=1.0), "another distill.temperature: temperature is 2.0 there, 1.0 here"),
    ],
)
def test_another_key_is_refused_by_name(cache: CachedLogits, key: CacheKey, words: str) -> None:
    for opened in (
        lambda: CachedLogits(cache.directory, key),
        lambda: write_cache(cache.directory, ROWS, FakeTeacher(), key),
    ):
        with pytest.raises(DataError) as caught:
            opened()
        assert words in str(caught.value) and "distill.cache_dir=DIR" in str(caught.value)


def test_what_cannot_be_a_cache_is_refused(tmp_path: Path, cache: CachedLogits) -> None:
    with pytest.raises(DataError, match="cached logits of 10 rows, there are 9 now"):
        write_cache(cache.directory, ROWS[:9], FakeTeacher(), KEY)
    with pytest.raises(DataError, match="no rows"):
        write_cache(tmp_path / "none", [], FakeTeacher(), KEY)
    with pytest.raises(DataError, match="row 10 of 10 cached rows"):
        cache.rows([10])
    with pytest.raises(DataError, match="has 9 tokens, the batch 8"):
        cache.rows([0, 1], length=8)
    for content in ("{", "[]", json.dumps({"rows": 3})):
        (cache.directory / "manifest.json").write_text(content)
        with pytest.raises(DataError, match="manifest"):
            CachedLogits(cache.directory, KEY)


def test_nan_in_the_teacher_is_an_error_with_its_row(tmp_path: Path) -> None:
    teacher = FakeTeacher()
    teacher.table[34] = torch.nan
    with pytest.raises(DataError, match="NaN in the teacher's logits of row 3"):
        write(tmp_path, teacher)


def test_progress_counts_shards(tmp_path: Path) -> None:
    seen: list[int] = []

    def progress(items: Iterator[int], total: int) -> Iterator[int]:
        seen.append(total)
        for item in items:
            seen.append(item)
            yield item

    write(tmp_path, FakeTeacher(), progress=progress)
    assert seen == [4, 0, 3, 6, 9]
