"""PEQA in 4 bits beside QLoRA, of a 7B Llama in place: speed and peak memory.

    python -m benchmarks.gpu.peqa_7b CASE [--tiny] [--work DIR]

CASE is WHAT:RECOMPUTE. 4 x 2048 random ids; QLoRA as in qlora_7b; PEQA by round-to-nearest with 8-bit AdamW.
"""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.gpu.measure import Case, Figures, Sizes, quiet, run, shape_of, sizes
from benchmarks.gpu.models import repeated_model
from benchmarks.gpu.qlora_words import qlora_words
from benchmarks.gpu.shapes import LLAMA_7B, Shape
from benchmarks.gpu.training import train_ours

PEQA = ("method.name=peqa", "method.init=rtn", "method.weight.format=int4", "optimizer.name=adamw_8bit")
G128 = (*PEQA, "method.weight.group_size=128")
KERNELS = ("auto", "plain")


def frozen(words: tuple[str, ...], recompute: str, shape: Shape, size: Sizes) -> Figures:
    """Trained over a frozen base that is quantized layer by layer."""
    common = ("trainer.gradient_clip_val=0.3", f"run.recompute={recompute}", "data.packing=false")
    return train_ours(repeated_model(shape), [*words, *common], shape, size)


def case(asked: argparse.Namespace, *, words: tuple[str, ...], recompute: str) -> Figures:
    """One of CASES."""
    return frozen(words, recompute, shape_of(LLAMA_7B, asked), sizes(asked))


CASES: dict[str, Case] = {}
for _level in ("none", "full"):
    CASES[f"qlora:{_level}"] = partial(case, words=tuple(qlora_words()), recompute=_level)
    for _kernels in KERNELS:
        for _name, _words in (("row", PEQA), ("g128", G128)):
            CASES[f"peqa-{_name}-{_kernels}:{_level}"] = partial(
                case, words=(*_words, f"method.kernels={_kernels}"), recompute=_level
            )

if __name__ == "__main__":
    quiet()
    run(__doc__, CASES)
