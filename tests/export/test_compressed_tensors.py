"""The pack-quantized directory: what is in it, how it falls back, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtrain.errors import ExportError, ModelError
from qtrain.export.compressed_tensors.config import CompressedTensorsOptions
from qtrain.export.compressed_tensors.write import write
from qtrain.export.integers.records import quantize_linear
from qtrain.models.quantized.checkpoint import read_records
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.record import LinearRecord
from qtrain.ptq.activation_stats import Calibration
from qtrain.ptq.gptq import output_error

Deploy = Callable[[PreTrainedModel], DeployedModel]
Build = Callable[..., PreTrainedModel]


def export(model: DeployedModel, directory: Path, tokenizer: Any = None, **keys: Any) -> dict[str, Any]:
    return write(model, CompressedTensorsOptions(**keys), directory, tokenizer=tokenizer, facts={})


@pytest.mark.parametrize("keys", [{"bits": 4}, {"bits": 8, "group_size": -1}, {"scales": "absmax", "group_size": 64}])
def test_what_is_read_back_is_what_was_decided(
    tmp_path: Path, tiny_model: Build, deploy: Deploy, keys: dict[str, Any]
) -> None:
    deployed = deploy(tiny_model())
    result = export(deployed, tmp_path / "out", **keys)
    read = dict(read_records(tmp_path / "out"))
    assert len(read) == result["quantized_layers"] == 14
    for tensor in deployed.tensors():
        if tensor.linear:
            record = read[tensor.name.removesuffix(".weight")]
            decided = quantize_linear(tensor, record.spec, keys.get("scales", "mse"))
            assert torch.equal(record.codes, decided.codes)
            assert torch.equal(record.scale, decided.scale)
            assert record.scale.dtype == decided.scale.dtype


def test_the_directory_is_whole(
    tmp_path: Path, tiny_model: Build, deploy: Deploy, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    out = tmp_path / "out"
    result = export(deploy(tiny_model()), out, tiny_tokenizer)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "chat_template.jinja" in names
    assert {path.stat().st_mode for path in out.iterdir()} == {(out / "config.json").stat().st_mode}
    assert result["bytes"] == sum(t.numel() * t.element_size() for t in load_file(out / "model.safetensors").values())
    assert result["bits_per_quantized_weight"] == pytest.approx(4.5, abs=0.05)
    assert str(tmp_path) not in "".join(p.read_text() for p in out.glob("*.json"))
    assert "linear layers, int4, " in (out / "README.md").read_text()


def test_the_group_size_falls_back_where_it_does_not_divide(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    model = tiny_model(hidden_size=96, intermediate_size=200, head_dim=24)
    result = export(deploy(model), tmp_path / "out", group_size=64)
    assert result["group_sizes"] == {"32": 12, "row": 2}
    assert result["fallbacks"] == [
        {"in_features": 96, "asked": 64, "used": 32, "layers": 12},
        {"in_features": 200, "asked": 64, "used": -1, "layers": 2},
    ]
    assert result["notes"][:2] == [
        "group_size=64 does not divide 96 inputs: 12 layers have groups of 32",
        "group_size=64 does not divide 200 inputs: 2 layers have one scale a row",
    ]
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [
        ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
        ["Linear"],
    ]


def test_ignored_layers_stay_as_they_are(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    model = tiny_model()
    result = export(deploy(model), tmp_path / "out", ignore=["re:.*down_proj", "model.layers.0.mlp.up_proj"])
    assert result["kept"] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(weights[name], model.state_dict()[name])
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == sorted(["lm_head", *result["kept"]])


def calibration_of(model: PreTrainedModel) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return Calibration(model, [torch.randint(4, 500, (2, 64), generator=generator) for _ in range(3)])


def expected_error(record: LinearRecord, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(output_error(weight, record.codes, record.qparams, hessian, record.spec).sum())


def test_calibration_lessens_every_layers_error(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.input_layernorm.weight.data = torch.logspace(-1, 1, 64)
    deployed, calibration = deploy(model), calibration_of(model)
    read = {}
    for name, given, keys in [
        ("plain", None, {}),
        ("weighed", calibration, {"rounding": "nearest"}),
        ("fed", calibration, {"rounding": "gptq"}),
    ]:
        options = CompressedTensorsOptions(**keys)
        result = write(deployed, options, tmp_path / name, tokenizer=None, facts={}, calibration=given)
        assert result["rounding"] == ("gptq" if name == "fed" else "nearest")
        assert result["calibration_tokens"] == (384 if given else 0)
        read[name] = dict(read_records(tmp_path / name))
    for layer, hessian in calibration.hessians(list(read["plain"])):
        weight = model.get_submodule(layer).weight.detach()
        assert torch.equal(read["weighed"][layer].scale, read["fed"][layer].scale)
        assert expected_error(read["fed"][layer], weight, hessian) < expected_error(
            read["weighed"][layer], weight, hessian
        )
        if layer.endswith(("q_proj", "k_proj", "v_proj")):  # the norm before them makes some inputs 100 times others
            diagonal = torch.diag(hessian.diagonal())
            assert expected_error(read["weighed"][layer], weight, diagonal) < 0.9 * expected_error(
                read["plain"][layer], weight, diagonal
            )


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(
    tmp_path: Path, tiny_model: Build, deploy: Deploy
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(ExportError, match="model.layers.1.mlp.up_proj.weight.*first is row 3"):
        export(deploy(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_quantize_is_an_error(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    with pytest.raises(ExportError, match="no layer is left"):
        export(deploy(tiny_model()), tmp_path / "out", ignore=["re:.*"])


@pytest.mark.parametrize(
    "keys", [{"bits": 3}, {"group_size": 0}, {"group_size": -2}, {"group": 32}, {"calibration_rows": 0}]
)
def test_options_are_checked(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CompressedTensorsOptions(**keys)


def test_another_layout_is_not_read_back(tmp_path: Path, tiny_model: Build) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="its weights are plain"):
        next(read_records(tmp_path))
