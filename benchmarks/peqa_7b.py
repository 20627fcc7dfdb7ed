"""Memory of PEQA on a 7B Llama shape, beside packed weights and the activations of a frozen 16-bit model.

    python benchmarks/peqa_7b.py OUT.md [--tokens 2048] [--batch 4] [--recompute none full] [--tiny]

Activations: what one forward and backward of the same model, frozen in 16 bits, needs above its weights, gradients
reaching the embeddings' outputs, with the same loss. Packed: bytes of the model after ``qtrain.prepare``, embeddings,
norms and lm_head in 16 bits included. PEQA's peak: of steps 2 to 4 with 8-bit Adam, its states included. Random weights
and tokens, bf16.
"""

from __future__ import annotations

import argparse
import gc
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qtrain
from qtrain.config.schema import OptimizerSection
from qtrain.models.fused import fuse_layers
from qtrain.modules.fused_packed import fuse_packed
from qtrain.modules.token_loss import chunked_loss
from qtrain.training.optimizers import build_optimizer, state_bytes

GIB = 2**30
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
TINY = {**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
WEIGHTS = {"row": {"format": "int4"}, "g128": {"format": "int4", "group_size": 128}}


def build(asked: argparse.Namespace, device: torch.device, *, keeps_outputs: bool) -> LlamaForCausalLM:
    shape = TINY | {"num_key_value_heads": 4} if asked.tiny else SHAPE
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=4096))
    finally:
        torch.set_default_dtype(torch.float32)
    fuse_layers(model, device, "auto", keeps_outputs=keeps_outputs)
    return model


def step(model: Any, ids: torch.Tensor) -> float:
    """Forward, chunked cross-entropy over lm_head, backward."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        loss = chunked_loss(model, {"input_ids": ids, "labels": ids})
    loss.backward()
    return float(loss.detach())


def train(model: Any, ids: torch.Tensor, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        step(model, ids)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def peak_of(work: Any, device: torch.device) -> int:
    """Most bytes allocated while ``work`` runs."""
    if device.type != "cuda":
        work()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def resident(model: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in [*model.parameters(), *model.buffers()])


def recompute(model: Any, how: str) -> None:
    if how == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    model.train()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--recompute", nargs="+", default=["full", "none"])
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(0, 32000, (asked.batch, asked.tokens), device=device)
    activations: dict[str, int] = {}
    rows = [
        "| weights | recompute | packed | activations | 16-bit scales, 8-bit state | bound | peak | ratio | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    model: Any = build(asked, device, keeps_outputs=False).requires_grad_(False)
    model.model.embed_tokens.register_forward_hook(lambda *given: given[2].requires_grad_())
    for how in asked.recompute:
        recompute(model, how)
        step(model, ids)
        activations[how] = peak_of(partial(step, model, ids), device) - resident(model)
    del model
    for name, weight in WEIGHTS.items():
        gc.collect()
        begin = time.monotonic()
        model = qtrain.prepare(build(asked, device, keeps_outputs=True), "peqa", init="rtn", weight=weight)
        print(fuse_packed(model, partial(torch.autocast, device.type, dtype=torch.bfloat16)), flush=True)
        gc.collect()
        print(f"{name}: packed in {time.monotonic() - begin:.0f} s, {resident(model) / GIB:.2f} GiB", flush=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        scale_bytes = sum(p.numel() * p.element_size() for p in trained)
        section = OptimizerSection(name="adamw_8bit", lr=1e-6)
        packed = resident(model) - scale_bytes
        allowed = sum(2 * p.numel() for p in trained) + state_bytes(trained, section)
        for how in asked.recompute:
            recompute(model, how)
            optimizer = build_optimizer([{"params": trained}], section)
            train(model, ids, optimizer, 1)
            begin = time.monotonic()
            peak = peak_of(partial(train, model, ids, optimizer, 3), device)
            speed = 3 * ids.numel() / (time.monotonic() - begin)
            bound = packed + activations[how] + (allowed if weight.get("group_size") else 0)
            figures = [f"{figure / GIB:.3f} GiB" for figure in (packed, activations[how], allowed, bound, peak)]
            rows.append(f"| {name} | {how} | {' | '.join(figures)} | {peak / bound:.3f} | {speed:,.0f} |")
            print(rows[-1], flush=True)
            del optimizer
        del model, trained
        gc.collect()
        torch.cuda.empty_cache()
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rows.append(f"\n{where}, torch {torch.__version__}; {asked.batch} x {asked.tokens} tokens. Asked: a ratio of 1.15.")
    asked.out.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
