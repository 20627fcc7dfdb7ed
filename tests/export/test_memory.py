"""An export holds one weight and one file's worth of tensors, however large the model is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qtrain.export.compressed_tensors.config import CompressedTensorsOptions
from qtrain.export.compressed_tensors.write import write as write_packed
from qtrain.export.merged.config import MergedOptions
from qtrain.export.merged.write import write as write_merged
from qtrain.export.writer import Writer
from qtrain.modules.deployed import DeployedModel, DeployedTensor
from qtrain.registry import resolve

FORMATS = [(write_packed, CompressedTensorsOptions), (write_merged, MergedOptions)]


@pytest.mark.parametrize(("write", "options"), FORMATS, ids=["compressed-tensors", "merged"])
def test_computed_weights_are_let_go(
    tmp_path: Path,
    tiny_model: Callable[..., PreTrainedModel],
    deploy: Callable[[PreTrainedModel], DeployedModel],
    write: Writer,
    options: Any,
) -> None:
    plain = deploy(tiny_model(num_hidden_layers=6))
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted(value: Callable[[], torch.Tensor]) -> torch.Tensor:
        nonlocal most
        computed = value().clone()
        alive.append(weakref.ref(computed))
        most = max(most, sum(t.numel() * t.element_size() for ref in alive if (t := ref()) is not None))
        return computed

    def tensors() -> Iterator[DeployedTensor]:
        for t in plain.tensors():
            yield DeployedTensor(t.name, t.shape, t.linear, lambda t=t: counted(t.value))

    sizes = [4 * torch.Size(t.shape).numel() for t in plain.tensors()]
    shard = max(sizes)
    write(
        DeployedModel(plain.config, None, tensors, plain.dtype),
        options(max_shard_size=str(shard)),
        tmp_path / "out",
        tokenizer=None,
        facts={},
    )
    assert sum(sizes) > 5 * shard
    # What fills a file, the weight just computed, and the one before it until its name is bound anew.
    assert most <= shard + 2 * max(sizes)


@pytest.mark.parametrize(("write", "options"), FORMATS)
def test_the_config_names_its_writer(write: Writer, options: Any) -> None:
    assert resolve(options.implementation) is write
