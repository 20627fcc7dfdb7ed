"""What stands between the products of a layer: norm, rotary embedding, SwiGLU, and the loss."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.gpu.kernel_cases.case import DEVICE, DTYPE, Case, Run, Sizes, only_on_a_gpu, tiles
from qtrain.kernels import cross_entropy as losses
from qtrain.kernels import rms_norm as norm
from qtrain.models.fused import liger_turn

EPS = 1e-5


def rms_norm(size: Sizes) -> Iterator[Case]:
    """Of the residual stream, its weight frozen."""
    shape = (size.tokens, size.hidden)
    x, dy = random(*shape), random(*shape)
    weight = random(size.hidden)
    r = norm.plain_forward(x, weight, EPS)[1]

    def forward() -> Run:
        kernel, y = tiles("rms_norm_tiles"), torch.empty_like(x)
        return lambda: (y, kernel.forward(x, weight, EPS, y))

    def backward() -> Run:
        kernel = tiles("rms_norm_tiles")
        return lambda: kernel.backward(x, weight, r, dy)

    def liger_forward() -> Run:
        function = _liger("ops.rms_norm").LigerRMSNormFunction
        return lambda: function.apply(x, weight, EPS, 0.0, "llama", False)

    def liger_backward() -> Run:
        leaf = x.detach().requires_grad_()
        y = _liger("ops.rms_norm").LigerRMSNormFunction.apply(leaf, weight, EPS, 0.0, "llama", False)
        return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)

    what = f"{shape[0]} x {shape[1]}"
    plain, peers = partial(norm.plain_forward, x, weight, EPS), {"liger-kernel": liger_forward}
    yield Case(f"forward, {what}", 2 * x.nbytes, forward, plain, peers=peers)
    plain, peers = partial(norm.plain_backward, x, weight, r, dy), {"liger-kernel": liger_backward}
    yield Case(f"backward, {what}", 3 * x.nbytes, backward, plain, peers=peers)


def gated(size: Sizes) -> Iterator[Case]:
    """SwiGLU."""
    gate, up, dh = (random(size.tokens, size.intermediate) for _ in range(3))

    def forward() -> Run:
        kernel = tiles("gated_tiles")
        return lambda: kernel.forward(gate, up)

    def backward() -> Run:
        kernel = tiles("gated_tiles")
        return lambda: kernel.backward(gate, up, dh)

    def plain_backward() -> Any:
        opened = F.silu(gate)
        return opened * up, torch.ops.aten.silu_backward(dh * up, gate), opened * dh

    def liger_forward() -> Run:
        ops = _liger("ops.swiglu")
        return lambda: ops.swiglu_forward(gate, up)

    def liger_backward() -> Run:
        ops, own = _liger("ops.swiglu"), [one.clone() for one in (gate, up)]
        return lambda: ops.swiglu_backward(*own, dh)

    what = f"{size.tokens} x {size.intermediate}"
    peers = {"liger-kernel": liger_forward}
    yield Case(f"forward, {what}", 3 * gate.nbytes, forward, lambda: F.silu(gate) * up, peers=peers)
    peers = {"liger-kernel, no h": liger_backward}
    yield Case(f"backward with h, {what}", 6 * gate.nbytes, backward, plain_backward, peers=peers)


def rotary(size: Sizes) -> Iterator[Case]:
    """q and k of as many heads, where they lie: liger-kernel's, which ``Rotary`` wraps."""
    q, k = (random(1, size.tokens, size.hidden) for _ in range(2))
    places = torch.arange(size.tokens, device=DEVICE)[:, None] / 1e4 ** torch.linspace(0, 1, size.head // 2).to(DEVICE)
    cos, sin = (turn(torch.cat([places, places], 1))[None].to(DTYPE) for turn in (torch.cos, torch.sin))

    def heads(x: Tensor) -> Tensor:
        return x.view(1, size.tokens, -1, size.head).transpose(1, 2)

    def ours() -> Run:
        tiles("rotary")
        _liger("ops.rope", anywhere=True)
        own = [heads(x.clone()) for x in (q, k)]
        return lambda: liger_turn(*own, cos, sin, back=False)

    what = f"{size.tokens} tokens, {size.hidden // size.head} heads of {size.head}"
    moved = 2 * (q.nbytes + k.nbytes) + 2 * cos.nbytes
    yield Case(what, moved, ours, lambda: apply_rotary_pos_emb(heads(q), heads(k), cos, sin))


def cross_entropy(size: Sizes) -> Iterator[Case]:
    """Losses of logits, and in their place the gradient: two reads and a write."""
    torch.manual_seed(1)
    logits = random(size.tokens, size.vocab)
    target = torch.randint(0, size.vocab, (size.tokens,), device=DEVICE)

    def ours() -> Run:
        kernel, own = tiles("cross_entropy_tiles"), logits.clone()
        return lambda: kernel.cross_entropy_(own, target, gradient=True)

    def peer() -> Run:
        function, own = _liger("transformers.functional").liger_cross_entropy, logits.clone().requires_grad_()
        return lambda: function(own, target)

    what = f"losses and gradient, {size.tokens} x {size.vocab}"
    own = logits.clone()
    plain = partial(losses.plain_, own, target, gradient=True)
    yield Case(what, 3 * logits.nbytes, ours, plain, peers={"liger-kernel": peer})


def random(*shape: int) -> Tensor:
    """Of the dtype that layers run in."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def _liger(module: str, *, anywhere: bool = False) -> Any:
    if not anywhere:
        only_on_a_gpu()
    return importlib.import_module(f"liger_kernel.{module}")
