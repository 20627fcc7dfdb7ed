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
from qtrain.export.config import FORMATS as FORMATS_BY_NAME
from qtrain.export.merged.config import MergedOptions
from qtrain.export.merged.write import write as write_merged
from qtrain.export.writer import Writer
from qtrain.methods.method import build_method
from qtrain.methods.peqa.config import PeqaOptions
from qtrain.modules.deployed import DeployedModel, DeployedTensor
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.record import LinearRecord
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


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "merged"])
def test_a_packed_base_is_unpacked_a_layer_at_a_time(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    method = build_method(
        PeqaOptions.model_validate({"name": "peqa", "init": "rtn", "weight": {"format": "int4", "group_size": 32}})
    )
    model = method.prepare(tiny_model(num_hidden_layers=6), compute_dtype=torch.float32, device=torch.device("cpu"))
    deployed = method.deployed(model, dtype=torch.float32)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted(made: torch.Tensor) -> torch.Tensor:
        nonlocal most
        alive.append(weakref.ref(made))
        most = max(most, sum(t.numel() * t.element_size() for ref in alive if (t := ref()) is not None))
        return made

    record, dense = PackedLinear.record, PackedLinear.dense_weight

    def counted_record(self: PackedLinear) -> LinearRecord:
        made = record(self)
        counted(made.codes)
        return made

    monkeypatch.setattr(PackedLinear, "record", counted_record)
    monkeypatch.setattr(PackedLinear, "dense_weight", lambda self, *given: counted(dense(self, *given)))
    options = FORMATS_BY_NAME.get(name).model_validate({"format": name, "max_shard_size": "40KB"})
    resolve(options.implementation)(deployed, options, tmp_path / "out", tokenizer=None, facts={})
    layers = [tensor for tensor in deployed.tensors() if tensor.record is not None]
    largest = max(torch.Size(tensor.shape).numel() for tensor in layers) * (4 if name == "merged" else 1)
    assert len(alive) >= len(layers) == 42
    # What fills a file, unpacked where it is to stay so; the layer at hand, and the one before it.
    assert most <= 2 * largest + (40_000 if name == "merged" else 0)


@pytest.mark.parametrize(("write", "options"), FORMATS)
def test_the_config_names_its_writer(write: Writer, options: Any) -> None:
    assert resolve(options.implementation) is write
