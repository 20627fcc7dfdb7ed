"""QAT over weights in fp32 and in bf16: the loss on held-out text, by how updates are rounded.

    python -m benchmarks.bf16_weights [OUT.md] [--tiny]

A Llama of two layers learns this repository's text byte by byte in fp32; then W4A8 QAT (groups of 32) goes on from
there at two learning rates, all products in bf16. "to nearest" is torch's AdamW on the same weights in bf16: what
`qtrain fit` refuses to be. Two seeds of data and rounding each. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qtrain.methods.method import build_method
from qtrain.methods.qat.config import QatOptions
from qtrain.training.stochastic_adamw import StochasticAdamW

ROOT = Path(__file__).parent.parent
BF16, CPU = torch.bfloat16, torch.device("cpu")
KEYS = {"name": "qat", "weight": {"format": "int4", "group_size": 32}, "activation": {"format": "int8"}}
RATES = (1e-3, 5e-5)
ROUNDED = {
    "fp32": "fp32, torch's AdamW",
    "adamw_16bit": "bf16 by chance, moments in bf16",
    "adamw": "bf16 by chance, moments in fp32",
    "nearest": "bf16 to nearest, moments in bf16",
}


def rows(text: Tensor, generator: torch.Generator, count: int = 8, length: int = 64) -> Tensor:
    starts = torch.randint(0, len(text) - length, (count,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts])


def descend(model: PreTrainedModel, optimizer: Optimizer, text: Tensor, steps: int, seed: int, bf16: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = rows(text, generator)
        with torch.autocast("cpu", dtype=BF16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out(model: PreTrainedModel, ids: Tensor) -> float:
    with torch.autocast("cpu", dtype=BF16):
        return float(model(input_ids=ids, labels=ids).loss)


def trained(
    start: PreTrainedModel, how: str, lr: float, text: Tensor, ids: Tensor, steps: int, seed: int
) -> tuple[float, float]:
    """Losses before and after."""
    storage = "fp32" if how == "fp32" else "bf16"
    method = build_method(QatOptions.model_validate({**KEYS, "weight_storage": storage}))
    model = method.prepare(copy.deepcopy(start), compute_dtype=BF16, device=CPU).train()
    assert isinstance(model, PreTrainedModel)
    before, groups = held_out(model, ids), method.parameter_groups(model, lr)
    optimizer: Optimizer
    if how in ("fp32", "nearest"):
        optimizer = AdamW(groups, lr=lr, weight_decay=0.0)
    else:
        moments = BF16 if how == "adamw_16bit" else torch.float32
        optimizer = StochasticAdamW(groups, lr=lr, moments=moments, seed=seed)
    descend(model, optimizer, text, steps, 2 + seed, bf16=True)
    return before, held_out(model, ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    steps, first = (3, 5) if asked.tiny else (150, 400)
    files = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("qtrain/**/*.py")])
    text = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    known, unknown = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    ids = rows(unknown, torch.Generator().manual_seed(9), count=96)
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=True,
    )
    start = LlamaForCausalLM(shape)
    descend(start, AdamW(start.parameters(), lr=2e-3), known, first, 1, bf16=False)
    lines = [f"| {'lr':<6} | {'weights and updates':<33} | before | after, two seeds |"]
    lines.append(f"|{'-' * 8}|{'-' * 35}|{'-' * 8}|{'-' * 18}|")
    for lr in RATES:
        for how, words in ROUNDED.items():
            found = [trained(start, how, lr, known, ids, steps, seed) for seed in (0, 1)]
            lines.append(f"| {lr:<6g} | {words:<33} | {found[0][0]:.4f} | {found[0][1]:.4f}   {found[1][1]:.4f}  |")
    lines += [
        "",
        f"nats a byte after {steps} steps of 8 x 64 bytes; in full precision {held_out(start, ids):.4f} before",
    ]
    lines.append(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\n".join(lines))
    if asked.out:
        asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
