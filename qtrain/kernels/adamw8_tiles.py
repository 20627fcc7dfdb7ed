"""A step of AdamW with moments of 8 bits, all tensors in one launch: 16 bytes a weight in fp32, read and written.

The Triton twin of ``qtrain.kernels.adamw8.plain_``, to the bit. Tensors are known by their addresses, which lie in a
table: 448 adapters of a 7B Llama are as many launches otherwise, each over before the next one is there.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.launch import launch

BLOCKS = 8
"""Of 256 numbers each, one after the other in a program of one warp: what it finds in the table serves all of them."""
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def reaches(x: Tensor) -> bool:
    """Whether a kernel can read it: bitsandbytes' paged memory counts as the CPU's."""
    return x.is_cuda or getattr(x, "is_paged", False)


class Table(NamedTuple):
    """Where tensors lie [n, 7]: parts but the gradient, size, first program of each; and the tensor of a program."""

    places: Tensor
    owners: Tensor
    dtype: torch.dtype


def table(tensors: Sequence[tuple[Tensor, ...]]) -> Table:
    """Of ``Parts`` that fit, of one dtype, for as long as they lie where they do."""
    rows = tuple((w.data_ptr(), *(part.data_ptr() for part in states), w.numel()) for w, _, *states in tensors)
    return Table(*_tables(rows, tensors[0][0].device), tensors[0][0].dtype)


def adamw8_(
    table: Table,
    gradients: Sequence[int],
    step: tuple[float, ...],
    maps: tuple[Tensor, ...],
    factor: Tensor | None = None,
) -> None:
    """One step on the current stream, in place.

    Args:
        gradients: where they lie.
        step, maps: an ``AdamW8Step``, and ``Maps``.
        factor: of the gradients, fp32 [] on their device; below 0 nothing is done.
    """
    device = maps[0].device
    # From pinned memory, of its own at each step: the host goes on, and may be at the next step before it is copied.
    places = torch.tensor(gradients, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    launch(
        _adamw8,
        (len(table.owners),),
        *(table.places, places, table.owners, *maps, *step, maps[0] if factor is None else factor),
        DTYPE=_TYPES[table.dtype],
        FACTOR=factor is not None,
        BLOCKS=BLOCKS,
        MORE1=maps[2].numel() - 255,
        MORE2=maps[3].numel() - 255,
        num_warps=1,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where PyTorch rounds twice
    )


@lru_cache(maxsize=64)
def _tables(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    programs = torch.tensor([triton.cdiv(row[-1], BLOCKS * 256) for row in rows])
    first = programs.cumsum(0) - programs
    places = torch.cat([torch.tensor(rows), first.unsqueeze(1)], dim=1)
    owners = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(programs)
    return places.to(device), owners.to(device)


@triton.jit
def _at(address, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _codes(moment, absmax, bounds_ptr, starts_ptr, MORE: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.math.div_rn(moment, tl.full(moment.shape, 0.0, tl.float32) + tl.where(absmax > 0, absmax, 1.0))
    start = tl.load(starts_ptr + (x.to(tl.uint32, bitcast=True) >> 17)).to(tl.int32)
    code = start
    for one in tl.static_range(MORE):
        code += (x > tl.load(bounds_ptr + start + one)).to(tl.int32)
    return code.to(tl.uint8)


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    w_ptr,
    g_ptr,
    codes1_ptr,
    codes2_ptr,
    absmax1_ptr,
    absmax2_ptr,
    left,
    values1_ptr,
    values2_ptr,
    bounds1_ptr,
    bounds2_ptr,
    starts1_ptr,
    starts2_ptr,
    beta1,
    share1,
    beta2,
    share2,
    rate,
    spread,
    kept,
    factor_ptr,
    WHOLE: tl.constexpr,
    FACTOR: tl.constexpr,
    MORE1: tl.constexpr,
    MORE2: tl.constexpr,
):
    place = tl.arange(0, 256)
    there = tl.full([256], True, tl.int1) if WHOLE else place < left
    # Past the end as where the gradient is not finite: both moments are 0 there.
    g = tl.load(g_ptr + place, mask=there, other=float("inf")).to(tl.float32)
    if FACTOR:
        g = g * tl.load(factor_ptr)
    w = tl.load(w_ptr + place, mask=there, other=0.0).to(tl.float32)
    m = tl.load(values1_ptr + tl.load(codes1_ptr + place, mask=there, other=0).to(tl.int32))
    v = tl.load(values2_ptr + tl.load(codes2_ptr + place, mask=there, other=0).to(tl.int32))
    m = m * tl.load(absmax1_ptr) * beta1 + g * share1
    v = v * tl.load(absmax2_ptr) * beta2 + g * share2 * g
    finite = v < float("inf")
    moved = (w + tl.math.div_rn(m, tl.math.sqrt_rn(v) + spread) * rate) * kept
    tl.store(w_ptr + place, tl.where(finite, moved, w).to(w_ptr.dtype.element_ty), mask=there)
    m, v = tl.where(finite, m, 0.0), tl.where(finite, v, 0.0)
    absmax1, absmax2 = tl.max(tl.abs(m), 0), tl.max(v, 0)
    tl.store(codes1_ptr + place, _codes(m, absmax1, bounds1_ptr, starts1_ptr, MORE1), mask=there)
    tl.store(codes2_ptr + place, _codes(v, absmax2, bounds2_ptr, starts2_ptr, MORE2), mask=there)
    tl.store(absmax1_ptr, absmax1)
    tl.store(absmax2_ptr, absmax2)


@triton.jit
def _adamw8(  # type: ignore[no-untyped-def]
    places_ptr,
    gradients_ptr,
    owners_ptr,
    values1_ptr,
    values2_ptr,
    bounds1_ptr,
    bounds2_ptr,
    starts1_ptr,
    starts2_ptr,
    beta1,
    share1,
    beta2,
    share2,
    rate,
    spread,
    kept,
    factor_ptr,
    DTYPE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    MORE1: tl.constexpr,
    MORE2: tl.constexpr,
):
    program = tl.program_id(0)
    owner = tl.load(owners_ptr + program)
    row = places_ptr + owner * 7
    first = (program - tl.load(row + 6)) * BLOCKS
    size = tl.load(row + 5)
    if FACTOR:
        size = tl.where(tl.load(factor_ptr) < 0, 0, size)
    w_ptr, g_ptr = _at(row, DTYPE), _at(gradients_ptr + owner, DTYPE)
    codes1_ptr, codes2_ptr = _at(row + 1, tl.uint8), _at(row + 2, tl.uint8)
    absmax1_ptr, absmax2_ptr = _at(row + 3, tl.float32), _at(row + 4, tl.float32)
    for one in range(BLOCKS):
        block = first + one
        start = block * 256
        left = size - start
        # Only the last block of a tensor needs masks, which take its loads apart.
        if left >= 256:
            _block(
                *(w_ptr + start, g_ptr + start, codes1_ptr + start, codes2_ptr + start),
                *(absmax1_ptr + block, absmax2_ptr + block, left),
                *(values1_ptr, values2_ptr, bounds1_ptr, bounds2_ptr, starts1_ptr, starts2_ptr),
                *(beta1, share1, beta2, share2, rate, spread, kept, factor_ptr, True, FACTOR, MORE1, MORE2),
            )
        elif left > 0:
            _block(
                *(w_ptr + start, g_ptr + start, codes1_ptr + start, codes2_ptr + start),
                *(absmax1_ptr + block, absmax2_ptr + block, left),
                *(values1_ptr, values2_ptr, bounds1_ptr, bounds2_ptr, starts1_ptr, starts2_ptr),
                *(beta1, share1, beta2, share2, rate, spread, kept, factor_ptr, False, FACTOR, MORE1, MORE2),
            )
