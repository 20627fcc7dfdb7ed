"""The product of bytes in tiles on int8 tensor cores, its scales and bias applied before anything is written.

The Triton twin of ``qtrain.kernels.int8_matmul.plain_int8_matmul``.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.launch import launch
from qtrain.kernels.quantize_rows import _to

GROUP = 8
"""Tiles of rows that go through the columns together, so that both operands stay in the L2 cache."""


class Tiles(NamedTuple):
    """Of the result, the depth of a step, and what Triton is told."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    @property
    def shared_bytes(self) -> int:
        """Of shared memory: operands of all stages."""
        return (self.m + self.n) * self.k * self.num_stages


CONFIGS = (
    Tiles(128, 256, 128, 8, 3),
    Tiles(128, 128, 128, 8, 3),
    Tiles(64, 128, 64, 4, 3),
    Tiles(32, 64, 64, 4, 3),
)
"""Largest first; 128 x 256 x 128 held 950 to 1,054 TOP/s on an H200, against 655 to 878 of torch._int_mm."""


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:
    """y = (a b^T) a_scale b_scale^T + bias [m, n] in ``dtype``; any strides, fast where k is contiguous."""
    (m, k), n = a.shape, b.shape[0]
    a_scale, b_scale, bias = in_line(a_scale, b_scale, bias)
    y = torch.empty(m, n, dtype=dtype, device=a.device)
    chosen = tiles or _chosen(m, n, a.device.index if a.is_cuda else None)
    launch(
        _product,
        (-(-m // chosen.m) * -(-n // chosen.n),),
        a,
        b,
        a_scale,
        a_scale if b_scale is None else b_scale,
        a_scale if bias is None else bias,
        y,
        m,
        n,
        k,
        a.stride(0),
        a.stride(1),
        b.stride(0),
        b.stride(1),
        SCALES=b_scale is not None,
        BIAS=bias is not None,
        WHOLE=k % chosen.k == 0,
        STEPS=-(-k // chosen.k),
        M=chosen.m,
        N=chosen.n,
        K=chosen.k,
        GROUP=GROUP,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return y


def in_line(
    a_scale: Tensor, b_scale: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same, each contiguous, as the kernels read them."""
    return (
        a_scale.contiguous(),
        None if b_scale is None else b_scale.contiguous(),
        None if bias is None else bias.contiguous(),
    )


@lru_cache(maxsize=4096)
def _chosen(m: int, n: int, device: int | None) -> Tiles:
    """The largest tiles that the product fills and the device has the shared memory for."""
    limit = shared_memory(device)
    fitting = [tiles for tiles in CONFIGS if tiles.shared_bytes <= limit and tiles.m <= m and tiles.n <= n]
    return fitting[0] if fitting else CONFIGS[-1]


@cache
def shared_memory(device: int | None) -> int:
    """Bytes that a program may have on a GPU; without one, the interpreter's, which has no limit."""
    if device is None:
        return 2**20
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    a_row,
    a_column,
    b_row,
    b_column,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    STEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile = tl.program_id(0)
    down, across = tl.cdiv(m, M), tl.cdiv(n, N)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    rows = (first + tile % (GROUP * across) % height) * M + tl.arange(0, M)
    columns = tile % (GROUP * across) // height * N + tl.arange(0, N)
    depth = tl.arange(0, K)
    # Past the end the first rows again: loads need no mask then, and what they give is not stored.
    a_ptr += (rows % m).to(tl.int64)[:, None] * a_row + depth[None, :] * a_column
    b_ptr += (columns % n).to(tl.int64)[None, :] * b_row + depth[:, None] * b_column
    total = tl.zeros([M, N], tl.int32)
    for step in range(STEPS):
        if WHOLE:
            a, b = tl.load(a_ptr), tl.load(b_ptr)
        else:
            a = tl.load(a_ptr, mask=depth[None, :] < k - step * K, other=0)
            b = tl.load(b_ptr, mask=depth[:, None] < k - step * K, other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        a_ptr += K * a_column
        b_ptr += K * b_column
    there, wide = rows < m, columns < n
    y = total.to(tl.float32) * tl.load(a_scale_ptr + rows, mask=there, other=0.0)[:, None]
    if SCALES:
        y *= tl.load(b_scale_ptr + columns, mask=wide, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + columns, mask=wide, other=0.0).to(tl.float32)[None, :]
    place = rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(y_ptr + place, _to(y, y_ptr.dtype.element_ty), mask=there[:, None] & wide[None, :])
