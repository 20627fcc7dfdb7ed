"""Run in a process of its own: load directories as anyone would, without qtrain, and hand out what they compute."""

# ruff: noqa: E402 (the import of qtrain is barred before anything else is imported)

import sys

sys.modules["qtrain"] = None  # type: ignore[assignment]

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

for directory in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, loading = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    problems = {kind: names for kind, names in loading.items() if names}
    assert not problems, problems
    ids = torch.tensor([tokenizer("The quick brown fox jumps over the lazy dog")["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    weights = {f"weight.{name}": value.clone() for name, value in model.named_parameters()}
    save_file({"ids": ids, "logits": logits, "tokens": tokens, **weights}, f"{directory}.seen")
