"""Formats of integer weights choose codes in one way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qtrain.export.config import FORMATS
from qtrain.models.quantized.checkpoint import read_quantized
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.record import LinearRecord
from qtrain.ptq.activation_stats import Calibration
from qtrain.registry import resolve

Build = Callable[..., PreTrainedModel]
Deploy = Callable[[PreTrainedModel], DeployedModel]


@pytest.mark.parametrize(
    "keys", [{"symmetric": False}, {"symmetric": True, "group_size": 64}, {"symmetric": False, "group_size": -1}]
)
def test_three_layouts_of_the_same_codes(
    tmp_path: Path, tiny_model: Build, deploy: Deploy, keys: dict[str, Any]
) -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    calibration = Calibration(model, [torch.randint(4, 500, (2, 64), generator=generator)])
    found: dict[str, dict[str, LinearRecord]] = {}
    for name in ("compressed-tensors", "gptq", "awq"):
        options = FORMATS.get(name).model_validate({"format": name, **keys})
        write = resolve(options.implementation)
        result = write(deploy(model), options, tmp_path / name, tokenizer=None, facts={}, calibration=calibration)
        assert result["zero_points"] != keys["symmetric"] and result["rounding"] == "gptq"
        found[name] = {layer: load() for layer, load in read_quantized(tmp_path / name).records.items()}
    first = found["compressed-tensors"]
    for records in (found["gptq"], found["awq"]):
        assert records.keys() == first.keys() and len(records) == 14
        for layer, record in records.items():
            assert torch.equal(record.codes, first[layer].codes)
            assert torch.equal(record.scale.float(), first[layer].scale.float())
            assert torch.equal(record.dequantize(), first[layer].dequantize())
