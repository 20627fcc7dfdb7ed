"""The product of bytes by programs that stay, fed by the copy engine of a Hopper GPU.

Another Triton twin of ``qtrain.kernels.int8_matmul.plain_int8_matmul``, for large aligned operands. A program takes
tile after tile, and what the next one multiplies is on its way while the last one is written: 1,224 to 1,299 TOP/s on
an H200, where ``int8_tiles`` has 1,053 to 1,138 and torch._int_mm 847.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qtrain.kernels.int8_tiles import in_line, shared_memory
from qtrain.kernels.launch import launch
from qtrain.kernels.quantize_rows import INTERPRETED, _to

GROUP = 8
"""Tiles of rows that go through the columns together, so that both operands stay in the L2 cache."""


class Tile(NamedTuple):
    """Of the result, and the depth of a step."""

    m: int
    n: int
    k: int


TILE = Tile(128, 256, 128)
"""256 x 128 was 4 % slower, a depth of 64 15 %."""
STAGES, WARPS = 4, 8
INTERPRETED_PROGRAMS = 3
"""Where there are no processors: fewer than tiles, so that programs take several."""
SHARED_BYTES = 232_448
"""Of Hopper, for a program."""


def fits(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel knows these operands [m, k] and [n, k]: on Hopper, rows of whole 16 bytes, and large."""
    if not a.is_cuda or not is_hopper(a.device.index) or dtype not in (torch.bfloat16, torch.float16):
        return False
    large = a.shape[0] >= TILE.m and b.shape[0] >= TILE.n
    return large and b.shape[0] % 8 == 0 and all(_copied(one) for one in (a, b))


def takes(into: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether it adds to ``into`` as well."""
    return fits(a, b, into.dtype) and into.is_contiguous() and into.data_ptr() % 16 == 0


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    into: Tensor | None = None,
) -> Tensor:
    """y = (a b^T) a_scale b_scale^T + bias [m, n] in ``dtype``, of 16 bits; k contiguous.

    Args:
        into: y is rounded and added to it, as it is written: a pass over three tensors less.
    """
    (m, k), n = a.shape, b.shape[0]
    a_scale, b_scale, bias = in_line(a_scale, b_scale, bias)
    y = torch.empty(m, n, dtype=dtype, device=a.device) if into is None else into
    tiles = triton.cdiv(m, TILE.m) * triton.cdiv(n, TILE.n)
    # One number for all shapes, or each count of tiles would be compiled anew.
    programs = _processors(a.device.index) if a.is_cuda else INTERPRETED_PROGRAMS
    launch(
        _product,
        (min(tiles, programs),),
        _described(a, TILE.m, TILE.k),
        _described(b, TILE.n, TILE.k),
        _described(y, TILE.m, TILE.n // 2),
        a_scale,
        a_scale if b_scale is None else b_scale,
        a_scale if bias is None else bias,
        m,
        n,
        SCALES=b_scale is not None,
        BIAS=bias is not None,
        ADDED=into is not None,
        STEPS=triton.cdiv(k, TILE.k),
        PROGRAMS=programs,
        TURNS=0 if a.is_cuda else triton.cdiv(tiles, programs),
        M=TILE.m,
        N=TILE.n,
        K=TILE.k,
        GROUP=GROUP,
        num_warps=WARPS,
        num_stages=STAGES - (into is not None),  # what is there takes a stage's room in shared memory
    )
    return y


def _described(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For the copy engine, in tiles; what Triton asserts of a shape is not asked anew at each launch: 3 x 4 us."""
    known = _shaped(tensor.shape, tensor.stride(), tensor.dtype, rows, columns)
    one = object.__new__(TensorDescriptor)
    one.__dict__.update(known.__dict__, base=tensor)
    return one


@lru_cache(maxsize=4096)
def _shaped(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, rows: int, columns: int
) -> TensorDescriptor:
    base = torch.empty(16, dtype=dtype)  # no tensor is held here
    return TensorDescriptor(base, list(shape), list(stride), [rows, columns])


def _copied(operand: Tensor) -> bool:
    """Whether the copy engine takes it."""
    aligned = operand.data_ptr() % 16 == 0 and operand.stride(0) % 16 == 0
    return operand.stride(1) == 1 and aligned and operand.shape[1] >= 16


@cache
def is_hopper(device: int) -> bool:
    """With its shared memory, of which 2 KB are left; for Blackwell Triton takes more, or other instructions."""
    return torch.cuda.get_device_capability(device)[0] == 9 and shared_memory(device) >= SHARED_BYTES


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    a_tiles,
    b_tiles,
    y_tiles,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    m,
    n,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    STEPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TURNS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    down, across = tl.cdiv(m, M), tl.cdiv(n, N)
    if INTERPRETED:  # its loops know no bounds but constants
        for turn in range(TURNS):
            tile = tl.program_id(0) + turn * PROGRAMS
            if tile < down * across:
                place = _place(tile, down, across, GROUP)
                y = _tile(
                    place, a_tiles, b_tiles, a_scale_ptr, b_scale_ptr, bias_ptr, m, n, SCALES, BIAS, STEPS, M, N, K
                )
                _store(y, y_tiles, place, ADDED, M, N)
    else:
        for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
            place = _place(tile, down, across, GROUP)
            y = _tile(place, a_tiles, b_tiles, a_scale_ptr, b_scale_ptr, bias_ptr, m, n, SCALES, BIAS, STEPS, M, N, K)
            _store(y, y_tiles, place, ADDED, M, N)


@triton.jit
def _place(tile, down, across, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of a tile, counted in tiles."""
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    return first + tile % (GROUP * across) % height, tile % (GROUP * across) // height


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    place,
    a_tiles,
    b_tiles,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    m,
    n,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    row, column = place[0] * M, place[1] * N
    total = tl.zeros([M, N], tl.int32)
    for step in range(STEPS):  # past an end the copy engine gives zeros
        a, b = a_tiles.load([row, step * K]), b_tiles.load([column, step * K])
        total = tl.dot(a, b.T, total, out_dtype=tl.int32)
    rows, columns = row + tl.arange(0, M), column + tl.arange(0, N)
    y = total.to(tl.float32) * tl.load(a_scale_ptr + rows, mask=rows < m, other=0.0)[:, None]
    if SCALES:
        y *= tl.load(b_scale_ptr + columns, mask=columns < n, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _store(y, y_tiles, place, ADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """In halves: beside the stages shared memory has no room for a whole tile."""
    row, column = place[0] * M, place[1] * N
    left, right = tl.split(tl.permute(tl.reshape(_to(y, y_tiles.dtype), (M, 2, N // 2)), (0, 2, 1)))
    _put(left, y_tiles, row, column, ADDED)
    _put(right, y_tiles, row, column + N // 2, ADDED)


@triton.jit
def _put(y, y_tiles, row, column, ADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    if ADDED:
        y = _to(y.to(tl.float32) + y_tiles.load([row, column]).to(tl.float32), y_tiles.dtype)
    y_tiles.store([row, column], y)
