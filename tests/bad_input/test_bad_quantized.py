"""Quantized bases and packed files that contradict themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TEXT = "the dog sleeps on and the fox jumps over it\n" * 40
PEQA = ["fit", "model.path=model", "data.train=text.txt", "data.max_length=32", "trainer.accelerator=cpu"]
PEQA += ["method.name=peqa", "method.init=checkpoint", "trainer.max_steps=1"]
LAYER = "model.layers.1.mlp.up_proj"
Change = Callable[[Path], object]


def tensors(change_of: Callable[[dict[str, Tensor]], object]) -> Change:
    def change(model: Path) -> None:
        path = model / "model.safetensors"
        found = load_file(path)
        change_of(found)
        save_file(found, path, metadata={"format": "pt"})

    return change


def header(**keys: Any) -> Change:
    def change(model: Path) -> None:
        path = model / "config.json"
        content = json.loads(path.read_text())
        content["quantization_config"] |= keys
        path.write_text(json.dumps(content))

    return change


def replaced(value: Any) -> Change:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": value}))

    return change


CASES: dict[str, dict[str, Any]] = {
    "no codes where they are asked for": dict(
        base=None,
        what="model.path holds 16-bit weights",
        where="model",
        rule="codes are kept where there are any",
        fix="a GPTQ, AWQ or compressed-tensors directory",
    ),
    "codes where none are asked for": dict(
        words=[*PEQA[:5], "method.name=qat", "trainer.max_steps=1"],
        what="model.path holds gptq codes",
        where="model",
        rule="neither unpacked unasked nor quantized a second time",
        fix="method.name=qlora method.base=checkpoint",
    ),
    "a method that is not read": dict(
        change=header(quant_method="vptq"),
        what="quant_method='vptq' is not read",
        where="model",
        rule="there is: gptq, awq",
        fix="start from the 16-bit model",
    ),
    "a description that is a list": dict(
        change=replaced([1]),
        what="quantization_config=[1] is no object",
        where="model/config.json",
        rule="as a JSON object",
        fix="remove quantization_config",
    ),
    "a description without a method": dict(
        change=replaced({"bits": 4}),
        what="quantization_config has no quant_method",
        where="model/config.json",
        rule="it names how the weights are stored",
        fix="remove quantization_config",
    ),
    "bits": dict(
        change=header(bits=5), what="bits=5", where="quantization_config", rule="one of 2, 3, 4, 8", fix="16-bit model"
    ),
    "bits that are a word": dict(
        change=header(group_size="many"),
        what="group_size='many'",
        where="quantization_config",
        rule="group_size is a whole number",
        fix="16-bit model",
    ),
    "groups that do not divide": dict(
        change=header(group_size=48),
        what="groups of 48 in rows of 128",
        where="proj",
        rule="the group size divides the layer's input width",
        fix="start from the 16-bit model",
    ),
    "groups of another size": dict(
        change=header(group_size=64),
        what=".qzeros of shape [4, 8]",
        where="model.safetensors",
        rule="has [2, 8]",
        fix="download the directory again",
    ),
    "a tensor that is not there": dict(
        change=tensors(lambda found: found.pop(f"{LAYER}.scales")),
        what=f"{LAYER}.scales is missing",
        where="model",
        rule="all tensors of its format",
        fix="download the directory again",
    ),
    "a dtype": dict(
        change=tensors(lambda found: found.update({f"{LAYER}.qweight": found[f"{LAYER}.qweight"].float()})),
        what=f"{LAYER}.qweight in F32",
        where="model.safetensors",
        rule="stored as I32",
        fix="download the directory again",
    ),
    "scales that are no numbers": dict(
        change=tensors(lambda found: found[f"{LAYER}.scales"].fill_(float("inf"))),
        what=f"{LAYER}.scales holds NaN or inf",
        where="model.safetensors",
        rule="scales are finite",
        fix="download the directory again",
    ),
    "an order of its own": dict(
        change=tensors(lambda found: found.update({f"{LAYER}.g_idx": torch.ones(64, dtype=torch.int32)})),
        what="act-order: column 0 belongs to group 1",
        where=f"{LAYER}.g_idx",
        rule="groups are 32 neighbours",
        fix="desc_act=false",
    ),
    "a layer that the model has not": dict(
        change=tensors(lambda found: found.update({"model.layers.7.qweight": torch.ones(2, 2, dtype=torch.int32)})),
        what="model.layers.7 is quantized there, and is no linear layer",
        where="model.layers.7",
        rule="nn.Linear layers by name",
        fix="start from the 16-bit model",
    ),
    "a scheme that is not read": dict(
        base="compressed-tensors",
        change=header(sparsity_config={"format": "sparse-24-bitmask"}),
        what="sparsity_config is set",
        where="quantization_config",
        rule="sparse weights are not read",
        fix="16-bit checkpoint",
    ),
    "a scheme that is none": dict(
        base="compressed-tensors",
        change=header(config_groups={"group_0": {"targets": 3}}),
        what="config_groups",
        where="quantization_config",
        rule="as compressed-tensors has it",
        fix="16-bit checkpoint",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_base(
    name: str, refused: Callable[..., str], exported: Callable[[str], Path], tiny_llama_dir: Path
) -> None:
    case = dict(CASES[name])
    base, change = case.pop("base", "gptq"), case.pop("change", lambda model: None)

    def copy(here: Path) -> None:
        shutil.copytree(exported(base) if base else tiny_llama_dir, here / "model")
        change(here / "model")

    refused(**{"words": PEQA, "files": {"text.txt": TEXT}} | case, change=copy)
