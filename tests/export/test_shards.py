"""Weights in files of bounded size."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qtrain.errors import ConfigError
from qtrain.export.shards import ShardWriter
from qtrain.export.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GB", 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500), ("7", 7), ("5GB", 5 * 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "1XB", "0GB", "-1GB", "5GiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(4, 400))
def test_every_tensor_is_found_where_the_index_says(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}
    with ShardWriter(directory, limit) as shards:
        for name, tensor in tensors.items():
            shards.add(name, tensor)
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    if sum(sizes) * 4 <= limit or len(sizes) == 1:
        assert files == ["model.safetensors"]
        assert load_file(directory / files[0]).keys() == tensors.keys()
        return
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) * 4
    assert list(index["weight_map"]) == list(tensors)
    for file in files:
        held = load_file(directory / file)
        assert len(held) == 1 or sum(t.numel() * 4 for t in held.values()) <= limit
        for name, tensor in held.items():
            assert index["weight_map"][name] == file
            assert torch.equal(tensor, tensors[name])
