"""The keys that all of our QLoRA rows share."""

from __future__ import annotations


def qlora_words() -> list[str]:
    """r 64, alpha 16, on all seven linears over NF4 with double quantization: the defaults but for r."""
    return ["method.name=qlora", "method.r=64", "optimizer.name=paged_adamw_8bit"]
