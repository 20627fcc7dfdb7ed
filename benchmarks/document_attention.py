"""Attention of packed rows: document by document, under a mask of pairs, and rows of one document by each back end.

    python benchmarks/document_attention.py OUT.md [--tiny]

Forward and backward of one layer's attention in bf16, 4 rows of 2,048 tokens or one of 16,384, heads of 128; medians of
rounds. A CPU (--tiny) runs fp32 on short rows, its documents one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qtrain.kernels.document_attention import document_attention

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BACK_ENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
ROUNDS = 12


def lengths_of(mean: int, length: int) -> list[int]:
    """Documents of a row, half to one and a half times ``mean`` long in turn; the last takes what is left."""
    found: list[int] = []
    while length - sum(found) > 2 * mean:
        found.append((mean // 2, mean, mean + mean // 2)[len(found) % 3])
    return [*found, length - sum(found)]


def timed(run: Callable[[], Tensor], leaves: tuple[Tensor, ...], upper: Tensor) -> float:
    """ms of a forward and backward, the median."""
    found = []
    for turn in range(ROUNDS + 3):
        if ON_GPU:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.autograd.grad(run(), leaves, upper)
        if ON_GPU:
            torch.cuda.synchronize()
        if turn >= 3:
            found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found)


def by_back_end(back_end: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(back_end):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def under_mask(query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
    """As transformers does it: a mask of pairs, and key heads repeated, for no fast back end takes both."""
    rows, heads, length, _ = query.shape
    numbers = torch.bucketize(torch.arange(rows * length, device=DEVICE), ends[1:].long(), right=True).view(
        rows, length
    )
    mask = (numbers[:, :, None] == numbers[:, None, :]).tril()[:, None]
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def row(rows: int, length: int, heads: int, kv_heads: int, mean: int) -> str:
    width = 128 if ON_GPU else 16
    query, key, value = (
        torch.randn(rows, length, n, width, device=DEVICE, dtype=DTYPE, requires_grad=True).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    upper = torch.randn_like(query)
    lengths = lengths_of(mean, length)
    ends = torch.tensor([0, *lengths * rows], device=DEVICE).cumsum(0).int()
    given = query, key, value
    measured = partial(timed, leaves=given, upper=upper)
    cells = [f"{rows} x {length:,}", f"{heads} / {kv_heads}", f"{len(lengths)}"]
    cells.append(f"{measured(lambda: document_attention(*given, ends, max(lengths))):.2f}")
    cells.append(f"{measured(lambda: under_mask(*given, ends)):.2f}")
    for back_end in BACK_ENDS.values():
        try:
            cells.append(f"{measured(partial(by_back_end, back_end, *given)):.2f}")
        except RuntimeError:  # it does not run here, or does not take these
            cells.append("-")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="short rows")
    asked = parser.parse_args()
    names = ["rows", "heads", "documents a row", "by document ms", "mask of pairs ms"]
    names += [f"one document, {name} ms" for name in BACK_ENDS]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    shapes = [(4, 2048), (1, 16384)] if not asked.tiny else [(2, 128)]
    for rows, length in shapes:
        for heads, kv_heads in ((32, 32), (32, 8)):
            for mean in (length // 9, length // 4):
                lines.append(row(rows, length, heads, kv_heads, mean))
                print(lines[-1], flush=True)
    where = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    lines += ["", f"{where}, torch {torch.__version__}, {str(DTYPE).removeprefix('torch.')}"]
    asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
