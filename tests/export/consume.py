"""Run in a process of its own: load directories as anyone would, without qtrain, and hand out what they compute."""

# ruff: noqa: E402 (the import of qtrain is barred before anything else is imported)

import json
import sys
from pathlib import Path

sys.modules["qtrain"] = None  # type: ignore[assignment]

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

for directory in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    layout = json.loads(Path(directory, "config.json").read_text())["quantization_config"]
    # compressed-tensors 0.20 under transformers 5.23 expects unpacked zero points unless it unpacks at once.
    asymmetric = any(not group["weights"]["symmetric"] for group in layout["config_groups"].values())
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if asymmetric else {}
    model, loading = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True, **options)
    problems = {kind: names for kind, names in loading.items() if names}
    assert not problems, problems
    ids = torch.tensor([tokenizer("The quick brown fox jumps over the lazy dog")["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    weights = {f"weight.{name}": value.clone() for name, value in model.named_parameters()}
    save_file({"ids": ids, "logits": logits, "tokens": tokens, **weights}, f"{directory}.seen")
