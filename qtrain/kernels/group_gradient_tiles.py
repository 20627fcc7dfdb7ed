"""Gradients of scales of groups straight from dY and X, by programs that stay, fed by a Hopper's copy engine.

ds[o, g] = sum_{k in g} (dY^T X)[o, k] (q - z)[o, k]: a tile of dY^T X is multiplied by the codes and summed over its
groups where it was made, in registers, and is never written. The twin of the parts in ``packed_linear``, which write
64 MiB of it in fp32 and read them again.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qtrain.kernels.int8_bulk import _place, _processors, is_hopper
from qtrain.kernels.packed_tiles import _codes
from qtrain.kernels.quantize_rows import INTERPRETED

OUT, IN, TOKENS = 128, 256, 64
"""Of a tile of dY^T X, and the depth of a step."""
TOGETHER = 8
"""Tiles of outputs that go through the inputs together, so that both operands stay in the L2 cache."""
STAGES, WARPS = 4, 8
GROUPS = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16)


def fits(dy: Tensor, x: Tensor, group: int) -> bool:
    """Whether the kernel knows dY [tokens, out] and X [tokens, in]: on Hopper, large, rows of whole 16 bytes."""
    if not dy.is_cuda or not is_hopper(dy.device.index) or dy.dtype not in DTYPES or x.dtype != dy.dtype:
        return False
    large = dy.shape[1] >= OUT and x.shape[1] >= IN and len(dy) >= TOKENS
    return large and group in GROUPS and all(_copied(one) for one in (dy, x))


def group_gradient(
    dy: Tensor,
    x: Tensor,
    words: Tensor,
    bits: int,
    groups: int,
    zero_point: Tensor | None,
    *,
    mid_rise: bool = False,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """sum_{k in g} G (q - z) and, if asked, sum_{k in g} G of G = dY^T X: fp32 [out, groups] each.

    Args:
        dy: [tokens, out]. x: [tokens, in].
        words: int32 [out, words].
        zero_point: [out, groups], of any number dtype.
        sums: the second result too.
    """
    (tokens, out), columns = dy.shape, x.shape[1]
    leveled = torch.empty(out, groups, dtype=torch.float32, device=dy.device)
    summed = torch.empty_like(leveled) if sums else None
    words = words.contiguous()
    tiles, steps = triton.cdiv(out, OUT) * triton.cdiv(columns, IN), triton.cdiv(tokens, TOKENS)
    # One number for all shapes, or each count of tiles would be compiled anew.
    programs = _processors(dy.device.index) if dy.is_cuda else tiles
    _groups[(min(tiles, programs),)](
        TensorDescriptor.from_tensor(dy, [TOKENS, OUT]),
        TensorDescriptor.from_tensor(x, [TOKENS, IN]),
        *(words, leveled if zero_point is None else zero_point.contiguous(), leveled),
        *(leveled if summed is None else summed, out, columns, words.shape[1], groups, steps),
        STEPS=steps if INTERPRETED else 0,
        GROUP=columns // groups,
        BITS=bits,
        ZERO=zero_point is not None,
        HALF=0.5 if mid_rise else 0.0,
        SUMS=sums,
        PROGRAMS=programs,
        M=OUT,
        N=IN,
        K=TOKENS,
        TOGETHER=TOGETHER,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return leveled, summed


def _copied(operand: Tensor) -> bool:
    """Whether the copy engine takes it."""
    size = operand.element_size()
    return operand.stride(1) == 1 and operand.data_ptr() % 16 == 0 and operand.stride(0) * size % 16 == 0


@triton.jit
def _groups(  # type: ignore[no-untyped-def]
    dy_tiles,
    x_tiles,
    words_ptr,
    zero_ptr,
    leveled_ptr,
    summed_ptr,
    out,
    columns,
    row_words,
    groups,
    steps,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HALF: tl.constexpr,
    SUMS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    down, across = tl.cdiv(out, M), tl.cdiv(columns, N)
    if INTERPRETED:  # its loops know no bounds but constants: there each tile has a program
        place = _place(tl.program_id(0), down, across, TOGETHER)
        total = tl.zeros([M, N], tl.float32)
        for step in range(STEPS):
            total = _step(total, dy_tiles, x_tiles, place, step, M, N, K)
        for half in tl.static_range(2):
            _sum(_half(total, half, M, N), words_ptr, zero_ptr, leveled_ptr, summed_ptr, place[0] * M,
                 place[1] * N + half * (N // 2), out, columns, row_words, groups,
                 GROUP, BITS, ZERO, HALF, SUMS, M, N // 2)  # fmt: skip
    else:
        for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
            place = _place(tile, down, across, TOGETHER)
            total = tl.zeros([M, N], tl.float32)
            for step in range(steps):
                total = _step(total, dy_tiles, x_tiles, place, step, M, N, K)
            for half in tl.static_range(2):
                _sum(_half(total, half, M, N), words_ptr, zero_ptr, leveled_ptr, summed_ptr, place[0] * M,
                     place[1] * N + half * (N // 2), out, columns, row_words, groups,
                     GROUP, BITS, ZERO, HALF, SUMS, M, N // 2)  # fmt: skip


@triton.jit
def _step(total, dy_tiles, x_tiles, place, step, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    # Past an end the copy engine gives zeros.
    dy, x = dy_tiles.load([step * K, place[0] * M]), x_tiles.load([step * K, place[1] * N])
    return tl.dot(dy.T, x, total)


@triton.jit
def _half(total, half: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Its left or its right half: the codes of a whole tile have no registers beside it."""
    left, right = tl.split(tl.permute(tl.reshape(total, (M, 2, N // 2)), (0, 2, 1)))
    return left if half == 0 else right


@triton.jit
def _sum(  # type: ignore[no-untyped-def]
    gradient,
    words_ptr,
    zero_ptr,
    leveled_ptr,
    summed_ptr,
    row,
    column,
    out,
    columns,
    row_words,
    groups,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HALF: tl.constexpr,
    SUMS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Of a tile [M, N] of dY^T X, N a multiple of the group."""
    rows = (row + tl.arange(0, M))[:, None]
    places = (column + tl.arange(0, N))[None, :]
    levels = _codes(words_ptr, rows, places, (rows < out) & (places < columns), row_words, BITS) + HALF
    leveled = tl.sum(tl.reshape(gradient * levels, (M, N // GROUP, GROUP)), axis=2)
    group = (column // GROUP + tl.arange(0, N // GROUP))[None, :]
    known = (rows < out) & (group < groups)
    own = rows.to(tl.int64) * groups + group
    if ZERO or SUMS:
        summed = tl.sum(tl.reshape(gradient, (M, N // GROUP, GROUP)), axis=2)
        if ZERO:
            leveled -= summed * tl.load(zero_ptr + own, mask=known, other=0).to(tl.float32)
        if SUMS:
            tl.store(summed_ptr + own, summed, mask=known)
    tl.store(leveled_ptr + own, leveled, mask=known)
