"""Products in bytes: int8 by tiles, by Hopper's copy engine and on a CPU, and e4m3 with its rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.kernel_cases.case import DEVICE, DTYPE, ON_GPU, Case, NotHere, Run, Sizes, only_on_a_gpu, tiles
from benchmarks.gpu.kernel_cases.layers import random
from qtrain.kernels import fp8_product as fp8
from qtrain.kernels import int8_product as cpu
from qtrain.kernels.int8_matmul import plain_int8_matmul


def fp8_product(size: Sizes) -> Iterator[Case]:
    """Rows to e4m3, and torch's product of them."""
    x, weight = random(size.tokens, size.hidden), random(size.intermediate, size.hidden)

    def rows() -> Run:
        kernel = tiles("fp8_tiles")
        return lambda: kernel.fp8_rows(x)

    def product() -> Run:
        only_on_a_gpu()
        if not fp8.has_fp8(DEVICE):
            raise NotHere("no fp8 units")
        return lambda: fp8.fp8_matmul(a, b, DTYPE)

    moved = x.nbytes + x.numel() + 4 * len(x)
    yield Case(f"rows, {size.tokens} x {size.hidden}", moved, rows, lambda: tuple(fp8.plain_fp8_rows(x)))
    a, b = fp8.plain_fp8_rows(x), fp8.plain_fp8_rows(weight)
    flops = 2 * size.tokens * size.hidden * size.intermediate
    moved = x.numel() + weight.numel() + DTYPE.itemsize * size.tokens * size.intermediate
    peers = {"torch, 16 bits": lambda: lambda: x @ weight.t()}
    what = f"torch._scaled_mm, {size.tokens} x {size.hidden} x {size.intermediate}"
    yield Case(what, moved, product, lambda: fp8.plain_fp8_matmul(a, b, DTYPE), flops, False, peers)


def int8_matmul(size: Sizes) -> Iterator[Case]:
    """Bytes with their scales, in tiles and in bulk; the plain twin is torch._int_mm and the scales after it."""
    m, n, k = size.tokens, size.intermediate, size.hidden
    a, b = (torch.randint(-128, 128, (rows, k), device=DEVICE, dtype=torch.int8) for rows in (m, n))
    s, t = (torch.rand(rows, device=DEVICE) / 1000 for rows in (m, n))

    def in_tiles() -> Run:
        kernel = tiles("int8_tiles")
        return lambda: kernel.int8_matmul(a, b, s, t, None, DTYPE)

    def in_bulk() -> Run:
        kernel = tiles("int8_bulk")
        if not kernel.fits(a, b, DTYPE):
            raise NotHere("needs Hopper, and operands of 16 bits in whole tiles")
        return lambda: kernel.int8_matmul(a, b, s, t, None, DTYPE)

    def bare() -> Run:
        return lambda: torch._int_mm(a, b.t())

    def wide() -> Run:
        x, weight = a.to(DTYPE), b.to(DTYPE)
        return lambda: x @ weight.t()

    moved = a.nbytes + b.nbytes + 4 * (m + n) + DTYPE.itemsize * m * n
    peers = {"torch._int_mm, no scales": bare, "torch, 16 bits": wide}
    for name, ours in (("tiles", in_tiles), ("bulk", in_bulk)):
        plain = partial(plain_int8_matmul, a, b, s, t, None, DTYPE)
        yield Case(f"{name}, {m} x {k} x {n}", moved, ours, plain, 2 * m * n * k, name == "tiles", peers)
        peers = {}


def int8_product(size: Sizes) -> Iterator[Case]:
    """oneDNN's product on a CPU (benchmarks/int8_cpu.py times it at its sizes)."""
    if ON_GPU:
        raise NotHere("a kernel for CPUs: benchmarks/int8_cpu.py")
    m, n, k = 256, size.intermediate, size.hidden
    x, weight = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    scale = torch.rand(n)

    def ours() -> Run:
        if not cpu.int8_product_is_exact():
            raise NotHere("this CPU has no VNNI")
        packed = cpu.pack_int8(weight)
        return lambda: cpu.int8_product(x, packed, scale)

    moved = x.nbytes + weight.nbytes + 4 * m * n
    yield Case(
        f"on a CPU, {m} x {k} x {n}", moved, ours, lambda: x.float() @ weight.float().t() * scale, 2 * m * n * k, False
    )
