"""A step of AdamW on one tensor, each part in fp32 or bf16; what goes back to bf16 is rounded by chance.

m <- m + (1 - beta1) (g - m);  v <- beta2 v + (1 - beta2) g^2;  w <- (1 - lr decay) w - lr m^ / (sqrt(v^) + eps)
with m^ = m / (1 - beta1^t), v^ = v / (1 - beta2^t) (Loshchilov 2019, arXiv 1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from qtrain.numerics.stochastic_rounding import counted_bits, round_stochastic

try:
    from qtrain.kernels import adamw_tiles
except ImportError:  # Triton comes with torch where there is a GPU
    adamw_tiles = None  # type: ignore[assignment]

CHUNK = 2**16
"""Numbers that are in fp32 at once without a GPU."""
CHUNK_BYTES = 11 * 4 * CHUNK
"""At most eleven numbers of 32 bits for each of them."""


class AdamWStep(NamedTuple):
    """All numbers of a step: as the formula above has them, once for all elements."""

    kept: float
    lr: float
    share: float
    beta2: float
    square_share: float
    correction: float
    eps: float

    @classmethod
    def of(cls, step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> AdamWStep:
        """The ``step``-th one, counted from 1."""
        beta1, beta2 = betas
        correction = 1 / math.sqrt(1 - beta2**step)
        return cls(1 - lr * weight_decay, lr / (1 - beta1**step), 1 - beta1, beta2, 1 - beta2, correction, eps)


def stream_keys(*numbers: int) -> tuple[int, int]:
    """Two keys of 32 bits for the random bits that these integers name."""
    digest = blake2b(b" ".join(b"%d" % number for number in numbers), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@torch.no_grad()
def adamw_(
    weight: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: AdamWStep,
    keys: tuple[int, int],
    factor: Tensor | None = None,
) -> None:
    """One step, in place: a pass over memory on a GPU with Triton, else in chunks.

    w's step is made with m and v as they are before they are rounded. fp32 parts are those of exact AdamW.

    Args:
        weight, gradient, m, v: of one shape, fp32 or bf16 each; m and v contiguous.
        keys: of the random bits; the same keys round alike.
        factor: of the gradient, fp32 [] on its device; below 0 nothing is done.
    """
    gradient = gradient.contiguous()
    own = weight if weight.is_contiguous() else weight.contiguous()
    if one_pass(weight):
        adamw_tiles.adamw_(own, gradient, m, v, step, keys, factor)
    else:
        plain_(own, gradient, m, v, step, keys, factor)
    if own is not weight:
        weight.copy_(own)


class Parts(NamedTuple):
    """A tensor with what its step takes: arguments of ``adamw_``."""

    weight: Tensor
    gradient: Tensor
    m: Tensor
    v: Tensor
    keys: tuple[int, int]


@torch.no_grad()
def adamw_all_(tensors: Iterable[Parts], step: AdamWStep, factor: Tensor | None = None) -> None:
    """``adamw_`` of all of them, small ones on a GPU in a launch together: each took the host 60 us."""
    together: dict[tuple[object, ...], list[Parts]] = {}
    for parts in tensors:
        kind = adamw_tiles.together(parts[:4]) if one_pass(parts.weight) else None
        if kind is None:
            adamw_(*parts[:4], step, parts.keys, factor)
        else:
            together.setdefault(kind, []).append(parts)
    for found in together.values():
        adamw_tiles.adamw_all_([parts[:4] for parts in found], step, [parts.keys for parts in found], factor)


def one_pass(weight: Tensor) -> bool:
    """Whether the kernel runs for it."""
    return adamw_tiles is not None and adamw_tiles.fits(weight)


def plain_(
    weight: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: AdamWStep,
    keys: tuple[int, int],
    factor: Tensor | None = None,
) -> None:
    """``adamw_`` in PyTorch's operations."""
    if factor is not None and factor < 0:
        return
    parts = [tensor.view(-1) for tensor in (weight, gradient, m, v)]
    rounds = any(tensor.dtype == torch.bfloat16 for tensor in (weight, m, v))
    for start in range(0, weight.numel(), CHUNK):
        w, g, m, v = (part[start : start + CHUNK] for part in parts)
        g32, m32, v32 = g.float(), m.float(), v.float()
        if factor is not None:
            g32 = g32 * factor
        m32 = m32 + (g32 - m32).mul_(step.share)
        v32 = (v32 * step.beta2).add_((g32 * g32).mul_(step.square_share))
        g32 = m32 / v32.sqrt().mul_(step.correction).add_(step.eps)
        w32 = (w.float() * step.kept).sub_(g32.mul_(step.lr))
        one = two = None
        if rounds:
            one, two = counted_bits(keys, start, len(w), w.device)
        _store(w, w32, one)
        _store(m, m32, None if one is None else one >> 16)
        _store(v, v32, two)


def _store(place: Tensor, value: Tensor, noise: Tensor | None) -> None:
    if place.dtype == torch.bfloat16:
        assert noise is not None
        value = round_stochastic(value, noise)
    place.copy_(value)
