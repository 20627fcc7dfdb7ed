"""The model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qtrain.export.card import write_card

PACKED: dict[str, Any] = {
    "format": "compressed-tensors",
    "bits": 4,
    "bits_per_quantized_weight": 4.5,
    "quantized_layers": 210,
    "group_sizes": {"32": 210},
    "scales": "mse",
    "rounding": "gptq",
    "calibration_tokens": 16384,
    "kept": [],
    "dtype": "bfloat16",
    "bytes": 123_400_000,
}


def card(directory: Path, facts: dict[str, Any], result: dict[str, Any]) -> tuple[dict[str, Any], str]:
    write_card(directory, facts, result)
    _, head, body = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_card_tells_what_is_known(tmp_path: Path) -> None:
    facts = {
        "base_model": "org/model",
        "license": "apache-2.0",
        "recipe": "qlora_llama",
        "method": "QLoRA, NF4 base, r 16",
        "training": {"optimizer steps": 120},
        "figures": [{"name": "perplexity", "trained": "22.1", "exported": "23.9"}],
    }
    head, body = card(tmp_path, facts, PACKED)
    assert head["base_model"] == "org/model"
    assert head["license"] == "apache-2.0"
    assert head["tags"] == ["qtrain", "compressed-tensors", "int4"]
    for line in (
        "| optimizer steps | 120 |",
        "| perplexity | 22.1 | 23.9 |",
        "| group sizes | 32 (210 layers) |",
        "| weights | 123.4 MB |",
        "| rounding | GPTQ, 16384 tokens of calibration |",
        "| scales | least squared error, weighted by calibration inputs |",
    ):
        assert line in body.splitlines()


def test_a_path_of_this_machine_is_not_told(tmp_path: Path) -> None:
    head, body = card(tmp_path, {"base_model": "/home/someone/models/SmolLM2"}, PACKED)
    assert "base_model" not in head
    assert "/home" not in body
    assert "| base model | SmolLM2 |" in body


def test_cards_of_the_other_formats_need_no_facts(tmp_path: Path) -> None:
    head, body = card(tmp_path, {}, {"format": "adapter", "bytes": 10})
    assert head["library_name"] == "peft"
    assert "PeftModel.from_pretrained" in body
    _, body = card(tmp_path, {}, {"format": "merged", "base": "dequantized", "dtype": "bfloat16", "bytes": 10})
    assert "merged into the dequantized base" in body
    assert "compressed-tensors" not in body
