"""Who loads an export: its consumer, or qtrain's own reader, which says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qtrain.export import consumers
from qtrain.export.config import FORMATS
from qtrain.export.consumers import CONSUMERS, Consumer, load_export
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.packed_linear import PackedLinear
from qtrain.registry import resolve

Build = Callable[..., PreTrainedModel]
Deploy = Callable[[PreTrainedModel], DeployedModel]


def export(name: str, deployed: DeployedModel, directory: Path, **keys: Any) -> Path:
    options = FORMATS.get(name).model_validate({"format": name, **keys})
    resolve(options.implementation)(deployed, options, directory, tokenizer=None, facts={})
    return directory


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_an_absent_consumer_is_named_and_stood_in_for(
    tmp_path: Path, tiny_model: Build, deploy: Deploy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(consumers, "find_spec", lambda package: None)
    directory = export(name, deploy(tiny_model()), tmp_path / "out")
    loaded = load_export(name, directory, torch.float32)
    assert loaded.by.name == "qtrain" and loaded.by.fp32
    assert loaded.note is not None and "transformers with GPTQModel is not installed" in loaded.note
    assert CONSUMERS[name].install in loaded.note and "pip install gptqmodel" in loaded.note
    assert isinstance(loaded.model.get_submodule("model.layers.0.mlp.up_proj"), PackedLinear)


def test_an_installed_consumer_loads_it_and_is_silent(
    tmp_path: Path, tiny_model: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    model = tiny_model()

    def load_model(section: Any, dtype: torch.dtype, *, device: Any) -> PreTrainedModel:
        print("a banner")
        asked.append(section.path)
        return model

    monkeypatch.setattr(consumers, "find_spec", lambda package: object())
    monkeypatch.setattr(consumers, "load_model", load_model)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    loaded = load_export("gptq", tmp_path, torch.float32)
    assert loaded.model is model and loaded.note is None and asked == [str(tmp_path)]
    assert loaded.by is CONSUMERS["gptq"] and not loaded.by.fp32
    assert capsys.readouterr().out == ""


def test_layers_of_several_kinds_are_not_for_transformers(
    tmp_path: Path, tiny_model: Build, qat_trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "find_spec", lambda package: object())
    rules = {"*.down_proj": {"weight": {"format": "int8"}}}
    method, model, _ = qat_trained(tiny_model(), {"weight": {"format": "int4"}, "rules": rules})
    directory = export("gptq", method.deployed(model, dtype=torch.float32), tmp_path / "out")
    loaded = load_export("gptq", directory, torch.float32)
    assert loaded.by.name == "qtrain" and "one layout for all layers" in str(loaded.note)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["merged", "compressed-tensors"])
def test_what_transformers_reads_it_loads(tmp_path: Path, tiny_model: Build, deploy: Deploy, name: str) -> None:
    loaded = load_export(name, export(name, deploy(tiny_model()), tmp_path / "out"), torch.float32)
    assert loaded.by == Consumer() and loaded.by.name == "transformers" and loaded.note is None
