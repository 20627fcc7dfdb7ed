"""Frozen weights of few bits: to numbers, to e4m3, and the sums that their scales' gradients are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor

from benchmarks.gpu.kernel_cases.case import DEVICE, DTYPE, Case, Run, Sizes, only_on_a_gpu, tiles
from benchmarks.gpu.kernel_cases.layers import random
from qtrain.kernels import nf4_dequantize as nf4
from qtrain.kernels import packed_linear as packing
from qtrain.kernels.fp8_product import plain_fp8_rows
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.packing import pack
from qtrain.numerics.spec import QuantSpec

GROUP = 32
SPEC = QuantSpec("int4", symmetric=False, group_size=GROUP, scale_dtype="fp32")


def nf4_dequantize(size: Sizes) -> Iterator[Case]:
    """NF4 in double quantization; its plain twin is bitsandbytes' own kernel."""
    shape = (size.intermediate, size.hidden)
    words, state = quantize_4bit(torch.randn(shape, device=DEVICE), compress_statistics=True, quant_type="nf4")
    numbers = shape[0] * shape[1]
    read = words.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    scale = plain_fp8_rows(nf4.dequantize_4bit(words, state, DTYPE)).scale

    def ours() -> Run:
        kernel = tiles("nf4_tiles")
        return lambda: kernel.dequantize(words, state, DTYPE)

    def fp8(turn: bool) -> Run:
        kernel = tiles("nf4_fp8_tiles")
        return lambda: kernel.codes(words, state, scale, DTYPE, turn)

    def plain_fp8(turn: bool) -> Tensor:
        codes = plain_fp8_rows(nf4.dequantize_4bit(words, state, DTYPE)).codes
        return codes.view(torch.uint8).t().contiguous().view(codes.dtype) if turn else codes

    what = f"{shape[0]} x {shape[1]}"
    moved = read + DTYPE.itemsize * numbers
    plain = partial(nf4.dequantize_4bit, words, state, DTYPE)
    yield Case(f"to numbers, {what}", moved, ours, plain, compiled=False)
    for turn, name in ((False, "to e4m3"), (True, "to e4m3 turned over")):
        made = [partial(one, turn) for one in (fp8, plain_fp8)]
        yield Case(f"{name}, {what}", read + scale.nbytes + numbers, *made, compiled=False)


def packed_linear(size: Sizes) -> Iterator[Case]:
    """int4 in groups of 32 with zero points, and outputs of a layer with one scale a row."""
    out, columns = size.intermediate, size.hidden
    weight = torch.randn(out, columns, device=DEVICE)
    qparams = choose_qparams(weight, SPEC)
    words = pack(quantize(weight, qparams, SPEC), SPEC.bits)
    scale, zero = qparams.scale.float(), qparams.zero_point
    assert zero is not None
    packed = packing.Packed(words, columns, SPEC)
    read = words.nbytes + scale.nbytes + zero.nbytes
    dy, y = random(size.tokens, out), random(size.tokens, out)
    row = torch.ones(out, 1, device=DEVICE)

    def dequantize() -> Run:
        kernel = tiles("packed_tiles")
        return lambda: kernel.dequantize(words, SPEC.bits, columns, scale, zero, DTYPE)

    def group_sums() -> Run:
        kernel, groups = tiles("packed_tiles"), scale.shape[1]
        return lambda: kernel.group_sums(weight, words, SPEC.bits, groups, zero, sums=True)

    def output_sums() -> Run:
        kernel = tiles("packed_tiles")
        return lambda: kernel.output_sums(dy, y, None).unsqueeze(1)

    def product() -> Run:
        only_on_a_gpu()
        x = random(size.tokens, columns)
        return lambda: torch.mm(dy.t(), x, out_dtype=torch.float32)

    what, moved = f"{out} x {columns}, int4 g{GROUP}", read + DTYPE.itemsize * weight.numel()
    yield Case(f"dequantize, {what}", moved, dequantize, lambda: packing.packed_weight(packed, scale, zero, DTYPE))
    moved, peers = read + weight.nbytes + scale.nbytes, {"the product dY^T X before it": product}
    plain = partial(packing._group_sums, weight, words, SPEC, scale.shape[1], zero, sums=True)
    yield Case(f"group sums, {what}", moved, group_sums, plain, peers=peers)
    plain = partial(packing._from_outputs, dy, y, None, row, tiled=False)
    yield Case(f"output sums, {size.tokens} x {out}", dy.nbytes + y.nbytes + row.nbytes, output_sums, plain)
