"""QLoRA of a 7B Llama from a checkpoint, as unsloth does it; the work of qlora_7b.

python -m benchmarks.gpu.checkpoint && python -m benchmarks.gpu.qlora_7b_unsloth CASE [--tiny] [--work DIR]
"""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.gpu.measure import (
    Case,
    Figures,
    NotHere,
    median_rate,
    peak_gib,
    quiet,
    random_batches,
    run,
    shape_of,
    sizes,
    time_steps,
)
from benchmarks.gpu.shapes import LLAMA_7B

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BARE = "llama-7b-bare"


def unsloth(asked: argparse.Namespace, *, recompute: str | bool) -> Figures:
    """FastLanguageModel in the loop of the other peers."""
    try:
        from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # before transformers and peft, which it patches
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise NotHere(f"unsloth: {' '.join(str(error).split())[:200]}") from None
    import bitsandbytes as bnb
    import torch

    shape, size = shape_of(LLAMA_7B, asked), sizes(asked)
    model, _ = FastLanguageModel.from_pretrained(
        str(asked.work / BARE),
        max_seq_length=size.length,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        local_files_only=True,
        fix_tokenizer=False,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=64,
        target_modules=TARGETS,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=recompute,
    )
    FastLanguageModel.for_training(model)
    model.train()
    optimizer = bnb.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    batches = random_batches(shape.vocab, size)
    steps = time_steps(batches, lambda batch: model(**batch).loss, optimizer, warm=size.warm, together=size.together)
    kinds = sorted({module.mlp.forward.__name__ for module in model.modules() if hasattr(module, "mlp")})
    said = [f"use_gradient_checkpointing={recompute}", *kinds]
    return Figures(median_rate(*steps), peak_gib(), shape.flops_per_token(trains=False), said)


CASES: dict[str, Case] = {
    "unsloth-none": partial(unsloth, recompute=False),
    "unsloth-full": partial(unsloth, recompute=True),
    "unsloth-offload": partial(unsloth, recompute="unsloth"),
}

if __name__ == "__main__":
    quiet()
    run(__doc__, CASES)
