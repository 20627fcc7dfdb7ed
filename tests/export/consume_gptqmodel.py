"""Run in a process of its own: load directories as anyone would, without qtrain, and hand out what they compute."""

# ruff: noqa: E402 (the import of qtrain is barred before anything else is imported)

import sys

sys.modules["qtrain"] = None  # type: ignore[assignment]

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = model(ids).logits
    # What each kernel computes of unit vectors: its weight, column by column.
    weights = {
        f"weight.{name}": module(torch.eye(module.in_features, dtype=torch.float16)).t().contiguous()
        for name, module in model.named_modules()
        if hasattr(module, "qweight")
    }
    save_file({"ids": ids, "logits": logits, **weights}, f"{directory}.seen")
