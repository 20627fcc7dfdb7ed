"""Peak memory of the 65B shape on one GPU, 1 x 512 tokens, everything recomputed.

    python -m benchmarks.gpu.shape_65b CASE [--tiny] [--work DIR]

Each layer is quantized from random 16-bit weights of its own turn: those of the whole model never exist. The states of
paged optimizers lie in managed memory, which the peak does not count: state_gib tells what they are.
"""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.gpu.measure import Case, Figures, Sizes, quiet, run, shape_of
from benchmarks.gpu.peqa_7b import G128, PEQA, frozen
from benchmarks.gpu.qlora_words import qlora_words
from benchmarks.gpu.shapes import LLAMA_65B


def case(asked: argparse.Namespace, *, words: tuple[str, ...]) -> Figures:
    """One of CASES."""
    size = Sizes(1, 64, 1, 1, 1) if asked.tiny else Sizes(1, 512, 2, 3, 1)
    return frozen(words, "full", shape_of(LLAMA_65B, asked), size)


CASES: dict[str, Case] = {
    "qlora": partial(case, words=tuple(qlora_words())),
    "peqa-row": partial(case, words=PEQA),
    "peqa-g128": partial(case, words=G128),
}

if __name__ == "__main__":
    quiet()
    run(__doc__, CASES)
