"""Levels of recomputation: speed, peak memory, and what the estimate said before.

    python benchmarks/recompute.py [OUT.md] [--batch 4] [--tokens 2048] [--tiny]

QLoRA on a 7B Llama shape (NF4, double quantization, r 64 on all seven linears, dropout 0), random weights and tokens,
paged 8-bit AdamW; medians of 6 steps after 2. "estimated" is what ``run.recompute=auto`` reckons with: weights that lie
there, gradients, optimizer state, and one layer run and measured. Levels that do not fit say so. --tiny: any device.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qtrain.config.compose import load_recipe
from qtrain.training.module import LanguageModule
from qtrain.training.optimizers import build_optimizer
from qtrain.training.recompute_budget import estimate

GIB = 2**30
WARM, STEPS = 2, 6
SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
TINY = {**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
LEVELS = (("none", None), ("selective", 8), ("selective", 16), ("selective", 24), ("full", None), ("offload", None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="?", metavar="OUT.md")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    batch, tokens, steps = (2, 64, 1) if asked.tiny else (asked.batch, asked.tokens, STEPS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_recipe(
        None,
        *(f"data.batch_size={batch}", f"data.max_length={tokens}", "method.r=64", "method.lora_dropout=0"),
        *("optimizer.name=paged_adamw_8bit", "data.packing=false"),
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**(TINY if asked.tiny else SHAPE), max_position_embeddings=4096))
    torch.set_default_dtype(torch.float32)
    module = LanguageModule(config, base=model)
    module.build(device)
    assert module.model is not None and module.recompute is not None and module._objective is not None
    plain = module.method.plain_model(module.model)
    optimizer = build_optimizer(module.method.parameter_groups(module.model, 1e-4), config.optimizer)
    on_gpu = device.type == "cuda"
    lying = torch.cuda.memory_allocated() if on_gpu else 0
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
        found = estimate(plain, module.recompute, config, device, module.loss_path)
    layer = found.layer
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    rows = [
        f"{batch} x {tokens} tokens, {name}, torch {torch.__version__}; layers: {module.fused}",
        f"a layer keeps {layer.saved / GIB:.3f} GiB, its input is {layer.input / GIB:.3f}, it works in "
        f"{layer.working / GIB:.3f}; the head takes {found.head / GIB:.3f}",
        "",
        "| level                                | tokens/s | of full | peak GiB | estimated GiB |",
        "|--------------------------------------|---------:|--------:|---------:|--------------:|",
    ]
    figures = []
    for level, count in LEVELS:
        module.recompute.set(level, count)
        expected = found.offloaded if level == "offload" else found.of(module.recompute.count)
        figures.append((module.recompute.name, *measure(module, optimizer, batch, tokens, steps), lying + expected))
    full = next(rate for label, rate, *_ in figures if label == "full")
    for label, rate, peak, expected in figures:
        speed = f"{rate:>8,.0f} | {rate / full:>6.2f}x" if rate and full else f"{'no room':>8} | {'':>7}"
        rows.append(f"| {label:<36} | {speed} | {peak / GIB:>8.2f} | {expected / GIB:>13.2f} |")
    print("\n".join(rows))
    if asked.report:
        Path(asked.report).write_text("\n".join(rows) + "\n", encoding="utf-8")


def measure(
    module: LanguageModule, optimizer: torch.optim.Optimizer, batch: int, tokens: int, steps: int
) -> tuple[float, int]:
    """(tokens a second, peak bytes); no speed where it does not fit."""
    assert module._objective is not None
    device = next(module.parameters()).device
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    try:
        for _ in range(WARM + steps if steps > 1 else 1):
            ids = torch.randint(0, 32000, (batch, tokens), device=device)
            begin = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
                loss = module._objective({"input_ids": ids, "labels": ids})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)
        return 0.0, torch.cuda.max_memory_allocated()
    kept = seconds[WARM:] or seconds
    return batch * tokens / statistics.median(kept), torch.cuda.max_memory_allocated() if on_gpu else 0


if __name__ == "__main__":
    main()
