"""QLoRA of a 7B Llama on short samples: tokens of samples a second, padding not counted.

    python -m benchmarks.gpu.checkpoint && python -m benchmarks.gpu.short_samples CASE [--tiny] [--work DIR]

Ours packs rows of 2048 with exact isolation of samples, 4 rows a step; peers pad micro-batches of 16 samples to their
longest, pack by TRL (its default: best fit, without padding), or concatenate without isolation. Lengths are drawn from
the quantiles of 999 instruction samples in Alpaca's form with GPT-4's answers and Alpaca's prompt around them, at 4
characters a token: mean 237, and padding to the longest of 16 makes 2.4 tokens of one. All tokens carry loss.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback

from benchmarks.gpu.checkpoint import MODEL
from benchmarks.gpu.measure import (
    Case,
    Figures,
    NotHere,
    Sizes,
    mean_rate,
    peak_gib,
    quiet,
    run,
    shape_of,
    sizes,
    synchronize,
    time_steps,
)
from benchmarks.gpu.models import ON_GPU
from benchmarks.gpu.qlora_7b import peft_model
from benchmarks.gpu.qlora_words import qlora_words
from benchmarks.gpu.shapes import LLAMA_7B
from benchmarks.gpu.training import fit_command

QUANTILES = (0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
LENGTHS = (50, 66, 72, 90, 187, 364, 490, 545, 671, 771)
SAMPLES, IN_A_BATCH = 1024, 16
Batch = dict[str, Tensor]


def samples(asked: argparse.Namespace) -> list[list[int]]:
    """Random ids in samples of such lengths; tiny ones a sixteenth as long."""
    drawn = np.random.default_rng(0)
    lengths = np.interp(drawn.random(128 if asked.tiny else SAMPLES), QUANTILES, LENGTHS)
    vocab = shape_of(LLAMA_7B, asked).vocab
    return [drawn.integers(0, vocab - 1, int(n) // (16 if asked.tiny else 1)).tolist() for n in lengths]


def short_sizes(asked: argparse.Namespace) -> Sizes:
    """8 steps, each by itself: they hold different numbers of tokens."""
    return replace(sizes(asked), steps=2 if asked.tiny else 8, together=1)


def ours(asked: argparse.Namespace, *, recompute: str) -> Figures:
    """`qtrain fit` on a file of texts, a word a token."""
    size = short_sizes(asked)
    file = asked.work / f"short-{asked.case}.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for ids in samples(asked):
            lines.write(json.dumps({"text": " ".join(f"w{i}" for i in ids[:-1])}) + "\n")  # and the end of the text
    words = [
        *(f"model.path={asked.work / MODEL}", f"data.train={file}", f"data.max_length={size.length}"),
        *(f"data.batch_size={size.rows}", *qlora_words(), f"trainer.max_steps={size.warm + size.steps}"),
        *("trainer.gradient_clip_val=0.3", f"run.recompute={recompute}"),
    ]
    return fit_command(words, asked, shape_of(LLAMA_7B, asked).flops_per_token(trains=False), size)


def padded(asked: argparse.Namespace) -> Iterator[Batch]:
    """Micro-batches of 16 in the order of the samples, as long as their longest."""
    drawn = samples(asked)
    for start in range(0, len(drawn), IN_A_BATCH):
        group = drawn[start : start + IN_A_BATCH]
        lengths = torch.tensor([len(ids) for ids in group])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(mask, torch.tensor(sum(group, [])))
        yield {
            "input_ids": ids,
            "labels": ids.masked_fill(~mask, -100),
            "attention_mask": mask.long(),
            "tokens": lengths.sum(),
        }


def concatenated(asked: argparse.Namespace) -> Iterator[Batch]:
    """One stream cut into full rows: samples see those before them (TRL's packing_strategy="wrapped")."""
    size = sizes(asked)
    stream = torch.tensor(sum(samples(asked), []))
    for part in stream.split(size.rows * size.length):
        if len(part) == size.rows * size.length:
            ids = part.view(size.rows, size.length)
            yield {"input_ids": ids, "labels": ids}


def peft(asked: argparse.Namespace, *, batches: Any, steps: int) -> Figures:
    """transformers + peft + bitsandbytes with recomputation on ``batches``."""
    warm, steps = (1, 2) if asked.tiny else (3, steps)
    model = peft_model(asked)
    optimizer = bnb.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    found = time_steps(islice(batches(asked), warm + steps), lambda batch: model(**batch).loss, optimizer, warm=warm)
    said = [f"attention {model.config._attn_implementation}, recomputation by torch.utils.checkpoint"]
    flops = shape_of(LLAMA_7B, asked).flops_per_token(trains=False)
    return Figures(mean_rate(*found), peak_gib(), flops, said, {"counted_steps": len(found[0])})


class _StepTimes(TrainerCallback):
    """Seconds of each step of transformers' Trainer."""

    def __init__(self, warm: int) -> None:
        self.warm, self.seconds, self.begin = warm, list[float](), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.warm and ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        synchronize()
        if state.global_step > self.warm:
            self.seconds.append(time.perf_counter() - self.begin)


def trl(asked: argparse.Namespace) -> Figures:
    """SFTTrainer with packing=True and what else it is by default."""
    try:
        from datasets import Dataset  # type: ignore[attr-defined]
        from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]
    except (ImportError, RuntimeError) as error:
        raise NotHere(f"trl: {' '.join(str(error).split())[:200]}") from None
    if asked.tiny and not ON_GPU:
        raise NotHere("trl: its SFTTrainer computes the loss in Triton, on a GPU")
    size = short_sizes(asked)
    config = SFTConfig(
        output_dir=str(asked.work / "trl"),
        packing=True,
        max_length=size.length,
        per_device_train_batch_size=size.rows,
        max_steps=size.warm + size.steps,
        optim="paged_adamw_8bit" if ON_GPU else "adamw_torch",
        max_grad_norm=0.3,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=ON_GPU,
        use_cpu=not ON_GPU,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    times = _StepTimes(size.warm)
    with warnings.catch_warnings(record=True) as caught:
        trainer = SFTTrainer(
            model=peft_model(asked),
            args=config,
            train_dataset=Dataset.from_dict({"input_ids": samples(asked)}),
            processing_class=AutoTokenizer.from_pretrained(asked.work / MODEL),
            callbacks=[times],
        )
    counts, collate = [], trainer.data_collator

    def counting(rows: Any) -> Any:
        batch = collate(rows)
        counts.append(sum(len(row["input_ids"]) for row in rows))
        return batch

    trainer.data_collator = counting
    trainer.train()
    rate = len(times.seconds) * sum(counts) / len(counts) / sum(times.seconds)
    said = [f"attention {trainer.model.config._attn_implementation}, padding-free {trainer.padding_free}"]
    said += [" ".join(str(one.message).split())[:160] for one in caught if "acking" in str(one.message)]
    return Figures(rate, peak_gib(), shape_of(LLAMA_7B, asked).flops_per_token(trains=False), said)


CASES: dict[str, Case] = {
    "ours-full": partial(ours, recompute="full"),
    "ours-none": partial(ours, recompute="none"),
    "peft-padded": partial(peft, batches=padded, steps=24),
    "trl-packed": trl,
    "peft-concatenated": partial(peft, batches=concatenated, steps=8),
}

if __name__ == "__main__":
    quiet()
    run(__doc__, CASES)
