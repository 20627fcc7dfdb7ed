"""Rows to their levels and to bytes: fake quantization, codes, codes of SwiGLU, e4m3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import int8_vectorwise_quant
from torch.nn import functional as F

from benchmarks.gpu.kernel_cases.case import DEVICE, Case, Run, Sizes, tiles
from benchmarks.gpu.kernel_cases.layers import random
from qtrain.kernels.codes import plain_codes
from qtrain.numerics.rules import Dynamic, Learned
from qtrain.numerics.spec import QuantSpec

TOKENS = Dynamic(QuantSpec("int8", granularity="per_token", group_size=None, scale_dtype="fp32"))
GROUPS = Learned(QuantSpec("int4", group_size=32, scale_dtype="bf16"))


def quantize_rows(size: Sizes) -> Iterator[Case]:
    """Inputs by token, and a weight in fp32 by groups of 32 whose ranges train."""
    x = random(size.tokens, size.hidden)
    weight, upper = (torch.randn(size.intermediate, size.hidden, device=DEVICE) for _ in range(2))
    scale = Dynamic(GROUPS.spec).qparams(weight, None, None).scale.float() * 0.7
    needs = (True, True, False)

    def inputs() -> Run:
        kernel = tiles("quantize_rows")
        return lambda: kernel.forward(TOKENS, x, None, None)

    def forward() -> Run:
        kernel = tiles("quantize_rows")
        return lambda: kernel.forward(GROUPS, weight, scale, None)

    def backward() -> Run:
        kernel = tiles("quantize_rows")
        return lambda: kernel.backward(GROUPS, weight, scale, None, upper, needs)[:2]

    what = f"{len(weight)} x {size.hidden}, W4 g32 learned"
    yield Case(f"forward, {len(x)} x {size.hidden}, A8", 2 * x.nbytes, inputs, lambda: TOKENS.forward(x))
    moved = weight.nbytes * 2 + scale.nbytes
    yield Case(f"forward, {what}", moved, forward, lambda: GROUPS.forward(weight, scale))
    moved = 3 * weight.nbytes + 2 * scale.nbytes
    yield Case(f"backward, {what}", moved, backward, lambda: GROUPS.backward(weight, scale, None, upper, needs)[:2])


def code_rows(size: Sizes) -> Iterator[Case]:
    """Codes of inputs, numbers of codes, codes turned over."""
    x = random(size.tokens, size.hidden)
    q, s = plain_codes(x, TOKENS)

    def codes() -> Run:
        kernel = tiles("code_rows")
        return lambda: kernel.codes(TOKENS, x, None)

    def numbers() -> Run:
        kernel = tiles("code_rows")
        return lambda: kernel.numbers(q, s, x.dtype)

    def turned() -> Run:
        kernel = tiles("code_rows")
        return lambda: kernel.turned(q)

    def peer() -> Run:
        narrow = x.to(torch.float16)
        return lambda: int8_vectorwise_quant(narrow)

    what, peers = f"{size.tokens} x {size.hidden}", {"bitsandbytes, fp16": peer}
    moved = x.nbytes + q.nbytes + s.nbytes
    yield Case(f"codes, {what}", moved, codes, lambda: plain_codes(x, TOKENS), peers=peers)
    yield Case(f"numbers, {what}", moved, numbers, lambda: (q * s.unsqueeze(1)).to(x.dtype))
    yield Case(f"turned, {what}", 2 * q.nbytes, turned, lambda: q.t().contiguous())


def gated_codes(size: Sizes) -> Iterator[Case]:
    """SwiGLU straight to bytes, and back."""
    gate, up, dh = (random(size.tokens, size.intermediate) for _ in range(3))
    q, s = plain_codes(F.silu(gate) * up, TOKENS)

    def forward() -> Run:
        kernel = tiles("gated_code_tiles")
        return lambda: kernel.forward(TOKENS.spec, gate, up)

    def backward() -> Run:
        kernel, own = tiles("gated_code_tiles"), dh.clone()  # fq(h) is written over it: the first run is compared
        return lambda: kernel.backward(TOKENS.spec, gate, up, own, s)

    def plain_backward() -> Any:
        opened = F.silu(gate)
        codes, scales = plain_codes(opened * up, TOKENS)
        d_gate = torch.ops.aten.silu_backward(dh * up, gate)
        return (codes * scales.unsqueeze(1)).to(gate.dtype), d_gate, opened.mul_(dh)

    what = f"{size.tokens} x {size.intermediate}"
    moved = 2 * gate.nbytes + q.nbytes + s.nbytes
    yield Case(f"forward, {what}", moved, forward, lambda: plain_codes(F.silu(gate) * up, TOKENS))
    yield Case(f"backward, {what}", 6 * gate.nbytes + s.nbytes, backward, plain_backward)
