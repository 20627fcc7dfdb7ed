"""Run in a process of its own: load directories as their cards say, without qtrain, and hand out what they compute."""

# ruff: noqa: E402 (the import of qtrain is barred before anything else is imported)

import sys
import warnings
from pathlib import Path

sys.modules["qtrain"] = None  # type: ignore[assignment]

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

for directory in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    base, loading = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    problems = {kind: names for kind, names in loading.items() if names}
    assert not problems, problems
    # A CPU with AVX512-BF16 would round the scales of blocks at the first evaluation; others do not.
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    kept = {f"base.{name}": value.detach().clone() for name, value in base.state_dict().items()}
    beside = Path(directory, "adapter").is_dir()
    model = PeftModel.from_pretrained(base, directory, subfolder="adapter").eval() if beside else base
    ids = torch.tensor([tokenizer("The quick brown fox jumps over the lazy dog")["input_ids"]])
    # Over layers that transformers made PEFT rounds the adapter's product before it is added, in bf16 and without
    # autocast; qtrain trains in bf16 under autocast, where there is one way alone.
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=base.dtype == torch.bfloat16):
        logits = model(input_ids=ids).logits
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    save_file({"ids": ids, "logits": logits, "tokens": tokens, **kept}, f"{directory}.seen")
