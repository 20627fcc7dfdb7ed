"""A step of AdamW whose moments are codes of 8 bits in blocks of 256, on many tensors at once.

m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  w <- (w - lr m^ / (sqrt(v^) + eps)) (1 - lr decay)
with m^ = m / (1 - beta1^t), v^ = v / (1 - beta2^t), and m, v = map[code] absmax between steps (Dettmers 2021, arXiv
2110.02861): the states of bitsandbytes, and its order on GPUs.

bitsandbytes' kernel divides by approximation, and rounds weights in 16 bits before they decay too: of its codes a few
are one off from these, and weights differ in their last places. Where g^2 overflows it goes on with infinities; here w
stays, and m = v = 0, which both do where g is not finite. (Its code for CPUs decays first, as the paper does.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from qtrain.kernels import adamw8_tiles
except ImportError:  # Triton comes with torch where there is a GPU
    adamw8_tiles = None  # type: ignore[assignment]

BLOCK = 256
ELSEWHERE = "not on a GPU with Triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class AdamW8Step(NamedTuple):
    """All numbers of a step, the same for all elements."""

    beta1: float
    share1: float
    beta2: float
    share2: float
    rate: float
    spread: float
    kept: float

    @classmethod
    def of(cls, step: int, *, lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> AdamW8Step:
        """The ``step``-th one, counted from 1. Betas are rounded to fp32 first: what corrects them fits them then."""
        beta1, beta2 = torch.tensor(betas, dtype=torch.float32).tolist()
        root = math.sqrt(1 - beta2**step)
        rate = -lr * root / (1 - beta1**step)
        return cls(beta1, 1 - beta1, beta2, 1 - beta2, rate, root * eps, 1 - lr * weight_decay)


class Parts(NamedTuple):
    """A tensor [n] with its gradient, and its states: codes [n], and absmax [ceil(n / 256)] in fp32."""

    weight: Tensor
    gradient: Tensor
    codes1: Tensor
    codes2: Tensor
    absmax1: Tensor
    absmax2: Tensor


class Maps(NamedTuple):
    """What codes of m and of v stand for [256], and what finds a number its code: ``bounds``, ``starts``."""

    values1: Tensor
    values2: Tensor
    bounds1: Tensor
    bounds2: Tensor
    starts1: Tensor
    starts2: Tensor

    @classmethod
    def of(cls, values1: Tensor, values2: Tensor) -> Maps:
        """Of two rising maps, on their device."""
        first, second = starts(bounds(values1.cpu())), starts(bounds(values2.cpu()))
        found = (tensor.to(values1.device) for pair in zip(first, second, strict=True) for tensor in pair)
        return cls(values1, values2, *found)


def bounds(values: Tensor) -> Tensor:
    """[255] of a rising map [256]: as many of them as lie below a number, that is its code.

    They lie half-way between neighbours, a number half-way has the even code, and none below 0 has the code of 0.
    """
    between = (values[:-1] + values[1:]) * 0.5
    between[1::2] = torch.nextafter(between[1::2], between.new_tensor(-torch.inf))
    below = int((values < 0).sum())
    if below:
        between[below - 1] = -torch.finfo(torch.float32).tiny
    return between


def starts(rising: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds [255 + n], and for the upper 15 bits of a number [2^15] how many of them are surely below it.

    Only the n next ones are left to compare with: 2 for the map of v, 1 for that of m. Those appended are infinite.
    """
    top = torch.arange(-(2**14), 2**14, dtype=torch.int32).roll(2**14) << 17
    one, other = top.view(torch.float32), (top | 2**17 - 1).view(torch.float32)
    low, high = (torch.bucketize(x, rising) for x in (torch.minimum(one, other), torch.maximum(one, other)))
    more = int((high - low).max())
    return torch.cat([rising, rising.new_full((more,), torch.inf)]), low.to(torch.uint8)


def has_kernel() -> bool:
    """Whether anything fits."""
    return adamw8_tiles is not None


def adamw8_(tensors: Sequence[Parts], step: AdamW8Step, maps: Maps, factor: Tensor | None = None) -> None:
    """One step on all of them, in place, in one launch on the current stream; they fit, and are of one dtype.

    Args:
        factor: of the gradients, fp32 [] on their device; below 0 nothing is done.
    """
    Tensors(tensors).step_([parts.gradient for parts in tensors], step, maps, factor)


class Tensors:
    """Those of many steps, as long as they and their states lie where they do."""

    def __init__(self, tensors: Sequence[Parts]) -> None:
        self._table = adamw8_tiles.table(tensors)

    def step_(self, gradients: Sequence[Tensor], step: AdamW8Step, maps: Maps, factor: Tensor | None = None) -> None:
        """``adamw8_`` with other gradients, which fit as those fitted that were there first."""
        places = [gradient.data_ptr() for gradient in gradients]
        adamw8_tiles.adamw8_(self._table, places, step, maps, factor)


def unfit(parts: Parts) -> str | None:
    """Why the kernel does not know these, if it does not: it reads 16 bytes at a time, of blocks of 256."""
    weight, gradient, codes1, codes2, absmax1, absmax2 = parts
    if adamw8_tiles is None or not all(map(adamw8_tiles.reaches, parts)):
        return ELSEWHERE
    if weight.dtype != gradient.dtype or weight.dtype not in DTYPES:
        return f"weights in {weight.dtype}, gradients in {gradient.dtype}".replace("torch.", "")
    if not weight.numel() == gradient.numel() == codes1.numel() == codes2.numel():
        return "states of another size"
    if not (codes1.dtype == codes2.dtype == torch.uint8 and absmax1.dtype == absmax2.dtype == torch.float32):
        return "states in other dtypes"
    if not absmax1.numel() == absmax2.numel() == -(-weight.numel() // BLOCK):
        return f"blocks of other than {BLOCK}"
    return None if all(map(readable, parts)) else "not contiguous, or not at a multiple of 16 bytes"


def readable(part: Tensor) -> bool:
    """Whether the kernel can read it 16 bytes at a time."""
    return adamw8_tiles.reaches(part) and part.is_contiguous() and part.data_ptr() % 16 == 0


@torch.no_grad()
def plain_(parts: Parts, step: AdamW8Step, maps: Maps, factor: Tensor | None = None) -> None:
    """``adamw8_`` of one tensor in PyTorch's operations."""
    if factor is not None and factor < 0:
        return
    weight = parts.weight
    # What fills the last block is not finite either.
    w, g = _blocks(weight.float()), _blocks(parts.gradient.float(), torch.inf)
    g = g if factor is None else g * factor
    m, v = (
        values[_blocks(codes).int()] * absmax.unsqueeze(1)
        for values, codes, absmax in zip(maps[:2], parts[2:4], parts[4:], strict=True)
    )
    m = m * step.beta1 + g * step.share1
    v = v * step.beta2 + g * step.share2 * g
    there = v < torch.inf
    root = v.double().sqrt().float()  # in fp32 MKL's is not always the nearest
    moved = (w + m / (root + step.spread) * step.rate) * step.kept
    weight.copy_(torch.where(there, moved, w).view(-1)[: weight.numel()].view_as(weight))
    for moment, rising, codes, absmax in zip((m, v), maps[2:4], parts[2:4], parts[4:], strict=True):
        moment = torch.where(there, moment, 0.0)
        absmax.copy_(moment.abs().amax(1))
        x = moment / torch.where(absmax > 0, absmax, 1.0).unsqueeze(1)
        codes.copy_(torch.bucketize(x, rising).view(-1)[: codes.numel()].view_as(codes))


def _blocks(x: Tensor, filler: float = 0) -> Tensor:
    return F.pad(x.reshape(-1), (0, -x.numel() % BLOCK), value=filler).view(-1, BLOCK)
