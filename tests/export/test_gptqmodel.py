"""GPTQ and AWQ exports read by transformers with GPTQModel, in a process that cannot import qtrain."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qtrain.export.config import FORMATS
from qtrain.export.consumers import CONSUMERS
from qtrain.registry import resolve

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in CONSUMERS["gptq"].packages),
    reason=f"it is not installed: {CONSUMERS['gptq'].install}",
)
Build = Callable[..., PreTrainedModel]
Train = Callable[..., Any]
GROUPS = {"group_size": 32}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gptq-v1": ("gptq", {"weight": {"format": "int4", **GROUPS}}, {}),
    "gptq-v2": ("gptq", {"weight": {"format": "int4", **GROUPS}}, {"layout": "v2"}),
    "gptq-rows": ("gptq", {"weight": {"format": "int8"}}, {}),
    "gptq-asymmetric": ("gptq", {"weight": {"format": "int4", "symmetric": False, **GROUPS}}, {}),
    "gptq-3": ("gptq", {"weight": {"format": "int3", **GROUPS}}, {}),
    "gptq-3-asymmetric": ("gptq", {"weight": {"format": "int3", "symmetric": False, **GROUPS}}, {}),
    "gptq-2": ("gptq", {"weight": {"format": "int2", "symmetric": False, **GROUPS}}, {}),
    "gptq-kept": ("gptq", {"weight": {"format": "int4", **GROUPS}, "skip": ["*.0.*.k_proj"]}, {}),
    "gptq-adapters": ("gptq", {"weight": {"format": "int4", **GROUPS}, "lora": {"r": 4}}, {}),
    "awq": ("awq", {"weight": {"format": "int4", "symmetric": False, **GROUPS}}, {}),
    "awq-symmetric": ("awq", {"weight": {"format": "int4", "group_size": 64}}, {}),
    "awq-rows": ("awq", {"weight": {"format": "int4", "symmetric": False}}, {}),
    "awq-kept": ("awq", {"weight": {"format": "int4", **GROUPS}, "skip": ["*.0.*.k_proj"]}, {}),
}


@pytest.fixture(scope="module")
def consumed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Build, qat_trained: Train) -> Path:
    """All cases exported, and read by one process (its imports take 10 s)."""
    folder = tmp_path_factory.mktemp("gptqmodel")
    for name, (export_format, training, keys) in CASES.items():
        method, model, _ = qat_trained(tiny_model(initializer_range=0.1), training)
        options = FORMATS.get(export_format).model_validate({"format": export_format, **keys})
        deployed = method.deployed(model, dtype=torch.float32)
        resolve(options.implementation)(deployed, options, folder / name, tokenizer=None, facts={})
    script = Path(__file__).with_name("consume_gptqmodel.py")
    done = subprocess.run(
        [sys.executable, script, *(folder / name for name in CASES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_it_multiplies_by_the_weights_of_the_training(
    consumed: Path, tiny_model: Build, qat_trained: Train, name: str
) -> None:
    seen = load_file(consumed / f"{name}.seen")
    _, model, layers = qat_trained(tiny_model(initializer_range=0.1), CASES[name][1])
    assert {key.removeprefix("weight.") for key in seen if key.startswith("weight.")} == layers.keys()
    for layer, module in layers.items():
        assert torch.equal(seen[f"weight.{layer}"], module.quantized_weight().to(torch.float16)), layer
    with torch.no_grad():
        logits = model(seen["ids"]).logits
    assert float(logits.std()) > 0.3
    torch.testing.assert_close(seen["logits"].float(), logits, rtol=0, atol=1e-2)
