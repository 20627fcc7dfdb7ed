"""QLoRA of a 7B Llama from a checkpoint: `qtrain fit` itself, and transformers + peft + bitsandbytes.

    python -m benchmarks.gpu.checkpoint && python -m benchmarks.gpu.qlora_7b CASE [--tiny] [--work DIR]

4 x 2048 random ids, r 64 on all seven linears, dropout 0, NF4 with double quantization, paged 8-bit AdamW, gradients
clipped at 0.3. unsloth's cases are in qlora_7b_unsloth.
"""

from __future__ import annotations

import argparse
from functools import partial

import bitsandbytes as bnb
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.gpu.checkpoint import MODEL, TOKENS
from benchmarks.gpu.measure import (
    Case,
    Figures,
    median_rate,
    peak_gib,
    quiet,
    random_batches,
    run,
    shape_of,
    sizes,
    time_steps,
)
from benchmarks.gpu.models import DTYPE, ON_GPU
from benchmarks.gpu.qlora_words import qlora_words
from benchmarks.gpu.shapes import LLAMA_7B
from benchmarks.gpu.training import fit_command

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 64


def ours(asked: argparse.Namespace, *, recompute: str, compute: str = "auto") -> Figures:
    """The command a user types."""
    size = sizes(asked)
    words = [
        *(f"model.path={asked.work / MODEL}", f"data.train={asked.work / TOKENS}"),
        *(f"data.max_length={size.length}", f"data.batch_size={size.rows}"),
        *(*qlora_words(), "trainer.gradient_clip_val=0.3", f"run.recompute={recompute}"),
        *(f"method.compute_dtype={compute}", f"trainer.max_steps={size.warm + size.steps}"),
    ]
    return fit_command(words, asked, shape_of(LLAMA_7B, asked).flops_per_token(trains=False), size)


def peft_model(asked: argparse.Namespace) -> PeftModel:
    """As PEFT's own documentation prepares it: recomputation, norms and embeddings in fp32."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPE
    )
    model = AutoModelForCausalLM.from_pretrained(
        asked.work / MODEL, device_map={"": 0 if ON_GPU else "cpu"}, dtype=DTYPE, quantization_config=quantization
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS))
    adapted.train()
    assert isinstance(adapted, PeftModel)
    return adapted


def peft(asked: argparse.Namespace) -> Figures:
    """With recomputation, in the loop of its documentation."""
    shape, size = shape_of(LLAMA_7B, asked), sizes(asked)
    model = peft_model(asked)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW8bit(trained, lr=2e-4)
    batches = random_batches(shape.vocab, size)
    steps = time_steps(batches, lambda batch: model(**batch).loss, optimizer, warm=size.warm, together=size.together)
    said = [f"attention {model.config._attn_implementation}, recomputation by torch.utils.checkpoint"]
    return Figures(median_rate(*steps), peak_gib(), shape.flops_per_token(trains=False), said)


CASES: dict[str, Case] = {
    "ours-none": partial(ours, recompute="none"),
    "ours-full": partial(ours, recompute="full"),
    "ours-offload": partial(ours, recompute="offload"),
    "ours-fp8": partial(ours, recompute="none", compute="fp8"),
    "peft-full": peft,
}

if __name__ == "__main__":
    quiet()
    run(__doc__, CASES)
