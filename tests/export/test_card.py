"""The model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qtrain.export.card import write_card

PACKED: dict[str, Any] = {
    "format": "compressed-tensors",
    "layout": "pack-quantized",
    "bits": 4,
    "zero_points": False,
    "inputs": None,
    "bits_per_quantized_weight": 4.5,
    "quantized_layers": 210,
    "group_sizes": {"32": 210},
    "scales": "mse",
    "rounding": "gptq",
    "calibration_tokens": 16384,
    "kept": [],
    "dtype": "bfloat16",
    "bytes": 123_400_000,
    "notes": [],
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
    head, body = card(tmp_path, {}, {"format": "adapter", "bytes": 10, "notes": []})
    assert head["library_name"] == "peft"
    assert "PeftModel.from_pretrained" in body
    merged = {"format": "merged", "base": "dequantized", "dtype": "bfloat16", "bytes": 10, "notes": []}
    _, body = card(tmp_path, {}, merged)
    assert "merged into the dequantized base" in body
    assert "compressed-tensors" not in body
    _, body = card(tmp_path, {}, merged | {"base": "trained"})
    assert "trained on quantized weights and stored on their levels" in body and "adapter" not in body


def test_what_the_checkpoint_cannot_say_is_told(tmp_path: Path) -> None:
    flag = "the KV cache was trained as int4: vllm serve --kv-cache-dtype int4_per_token_head"
    trained = {"layout": "int-quantized", "inputs": "int8, one scale a token", "scales": "as trained", "notes": [flag]}
    _, body = card(tmp_path, {}, PACKED | trained)
    assert f"\n## To know\n\n- {flag}\n\n## Use\n" in body
    assert "int4 weights and inputs in int8, one scale a token in the compressed-tensors layout `int-quantized`" in body
    assert "| scales and codes | those of the last training step |" in body and "| rounding" not in body
    assert "To know" not in card(tmp_path, {}, PACKED)[1]
