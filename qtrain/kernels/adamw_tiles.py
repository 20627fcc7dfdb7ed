"""A step of AdamW in one pass over memory: reads w, g, m, v, and writes w, m, v; 14 bytes a weight in bf16.

The Triton twin of ``qtrain.kernels.adamw.plain_``, with the same random bits. Large tensors have a launch each, whose
programs begin at once; small ones share a launch, whose programs look in a table where their tensor lies.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.launch import launch

BLOCK = 1024
LARGE = 2**24
"""Numbers from which a launch of its own is over after the host has made the next one (60 us)."""
BLOCKS = 4
"""One after the other in a program that looks in the table first."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def fits(x: Tensor) -> bool:
    """Whether the kernel knows this tensor."""
    return x.is_cuda and x.numel() > 0 and x.dtype in (torch.float32, torch.bfloat16)


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: tuple[float, ...],
    keys: tuple[int, int],
    factor: Tensor | None = None,
) -> None:
    """In place, on contiguous tensors.

    Args:
        step: the numbers of an ``AdamWStep``.
        factor: of the gradient, fp32 [] on its device, below 0 nothing is done: a pointer, so that the host does not
            wait for it.
    """
    size = weight.numel()
    first, second = map(_as_int32, keys)
    launch(
        _adamw,
        (triton.cdiv(size, BLOCK),),
        *(weight, gradient, m, v, m if factor is None else factor, size, *step, first, second),
        FACTOR=factor is not None,
        BLOCK=BLOCK,
    )


def together(tensors: Sequence[Tensor]) -> tuple[object, ...] | None:
    """What tensors w, g, m, v must have in common with others to share a launch; None where they are too large."""
    size = tensors[0].numel()
    if size >= LARGE or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    aligned = size % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return (tensors[0].device, *(tensor.dtype for tensor in tensors), aligned)


def adamw_all_(
    tensors: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    step: tuple[float, ...],
    keys: Sequence[tuple[int, int]],
    factor: Tensor | None = None,
) -> None:
    """``adamw_`` of small tensors that have ``together`` in common, in one launch."""
    device, *dtypes, aligned = together(tensors[0]) or ()
    assert isinstance(device, torch.device)
    rows = tuple((w.data_ptr(), m.data_ptr(), v.data_ptr(), w.numel()) for w, _, m, v in tensors)
    places, owners = _tables(rows, device)
    given = [[own[1].data_ptr(), *map(_as_int32, pair)] for own, pair in zip(tensors, keys, strict=True)]
    # From pinned memory, of its own at each step: the host goes on, and may be at the next step before it is copied.
    at_step = torch.tensor(given, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    launch(
        _adamw_all,
        (len(owners),),
        *(places, owners, at_step, places if factor is None else factor, *step),
        *(_TYPES[dtype] for dtype in dtypes if isinstance(dtype, torch.dtype)),
        FACTOR=factor is not None,
        ALIGNED=bool(aligned),
        BLOCK=BLOCK,
        BLOCKS=BLOCKS,
    )


def _as_int32(key: int) -> int:
    """An argument that does not fit would be another type, and another compilation."""
    return key - 2**32 if key >= 2**31 else key


@lru_cache(maxsize=64)
def _tables(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows with each tensor's first program [n, 5], and the tensor of each program."""
    programs = torch.tensor([triton.cdiv(row[-1], BLOCK * BLOCKS) for row in rows])
    first = programs.cumsum(0) - programs
    owners = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(programs)
    return torch.cat([torch.tensor(rows), first.unsqueeze(1)], dim=1).to(device), owners.to(device)


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -2073254261  # 0x846ca68b as int32
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _rounded(x, noise, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        up = bits + (noise & 0xFFFF)
        up = tl.where((bits & 0x7FFFFFFF) < 0x7F7F0000, up, bits)
        up = tl.where(x != x, 0x7FC00000, up)
        x = (up & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    factor_ptr,
    place,
    size,
    kept,
    lr,
    share,
    beta2,
    square_share,
    correction,
    eps,
    first,
    second,
    FACTOR: tl.constexpr,
):
    if FACTOR:
        factor = tl.load(factor_ptr)
        size = size * (1 - (factor < 0).to(tl.int32))  # a product, so that 16 divides it still and loads stay whole
    there = place < size
    w = tl.load(w_ptr + place, mask=there, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + place, mask=there, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + place, mask=there, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + place, mask=there, other=0.0).to(tl.float32)
    if FACTOR:
        g = g * factor
    m = m + (g - m) * share
    v = v * beta2 + g * g * square_share
    spread = tl.math.sqrt_rn(v) * correction + eps
    w = w * kept - tl.math.div_rn(m, spread) * lr
    one = _mix(_mix(place.to(tl.int32) ^ first) + second)
    two = _mix(one + first)
    tl.store(w_ptr + place, _rounded(w, one, w_ptr.dtype.element_ty), mask=there)
    tl.store(m_ptr + place, _rounded(m, one >> 16, m_ptr.dtype.element_ty), mask=there)
    tl.store(v_ptr + place, _rounded(v, two, v_ptr.dtype.element_ty), mask=there)


# Keys and rates change at each step: specialized for 1 and for multiples of 16 they would be compiled anew.
@triton.jit(do_not_specialize=["first", "second"])
def _adamw(  # type: ignore[no-untyped-def]
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    factor_ptr,
    size,
    kept,
    lr,
    share,
    beta2,
    square_share,
    correction,
    eps,
    first,
    second,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _block(
        *(w_ptr, g_ptr, m_ptr, v_ptr, factor_ptr, tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), size),
        *(kept, lr, share, beta2, square_share, correction, eps, first, second, FACTOR),
    )


@triton.jit
def _at(address_ptr, dtype: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    found = tl.load(address_ptr).to(tl.pointer_type(dtype))
    return tl.multiple_of(found, 16) if ALIGNED else found


@triton.jit
def _adamw_all(  # type: ignore[no-untyped-def]
    places_ptr,
    owners_ptr,
    given_ptr,
    factor_ptr,
    kept,
    lr,
    share,
    beta2,
    square_share,
    correction,
    eps,
    W: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    program = tl.program_id(0)
    owner = tl.load(owners_ptr + program)
    row, given = places_ptr + owner * 5, given_ptr + owner * 3
    w_ptr, g_ptr = _at(row, W, ALIGNED), _at(given, G, ALIGNED)
    m_ptr, v_ptr = _at(row + 1, M, ALIGNED), _at(row + 2, V, ALIGNED)
    size = tl.load(row + 3)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    first, second = tl.load(given + 1).to(tl.int32), tl.load(given + 2).to(tl.int32)
    start = (program - tl.load(row + 4)) * BLOCKS
    for block in range(BLOCKS):
        place = (start + block) * BLOCK + tl.arange(0, BLOCK)
        _block(
            *(w_ptr, g_ptr, m_ptr, v_ptr, factor_ptr, place, size),
            *(kept, lr, share, beta2, square_share, correction, eps, first, second, FACTOR),
        )
