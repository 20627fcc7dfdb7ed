"""Rotary embeddings in place, beside layers that keep their outputs: the gradients of those that copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from qtrain.errors import ModelError
from qtrain.kernels.kept_output import KeptOutput
from qtrain.kernels.rotary import Rotary, Turn, is_kept, turned
from qtrain.methods.peqa.config import PeqaOptions
from qtrain.methods.peqa.method import Peqa
from qtrain.models.fused import liger_turn
from qtrain.modules.packed_identity import packed_layers
from qtrain.training.recompute import Recompute

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
KERNELS = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or Triton's interpreter")
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3} | ({torch.bfloat16: 2e-2} if ON_GPU else {})
"""Of a norm; the interpreter multiplies no bf16."""
IDS = torch.arange(3, 43, device=DEVICE).view(2, 20)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    """As a kernel does it: in place where tokens lie together, and without autograd's notice."""
    sign = -1.0 if back else 1.0
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    for x in (q.data, k.data):
        first, second = (half.clone() for half in x.chunk(2, dim=-1))
        c, s = (one.unsqueeze(1).chunk(2, dim=-1)[0] for one in (cos, sin * sign))
        x.copy_(torch.cat([first * c - second * s, second * c + first * s], dim=-1))
    return q.view_as(q), k.view_as(k)


class Keeping(torch.autograd.Function):
    """y = w x, and dL/dw read off y: sum(dY Y) / w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        y = x * w
        ctx.save_for_backward(y, w)
        ctx.keeps_output = True
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        y, w = ctx.saved_tensors
        return gradients[0] * w, (gradients[0] * y).sum((0, 1)) / w


def angles(tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    theta = torch.arange(tokens, dtype=dtype)[:, None] / (3.0 ** torch.arange(width // 2, dtype=dtype))
    both = torch.cat([theta, theta], dim=-1)[None]
    return both.cos(), both.sin()


def heads(x: Tensor, width: int) -> Tensor:
    return x.view(*x.shape[:2], -1, width).transpose(1, 2)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    of_q=st.integers(1, 4),
    of_k=st.integers(1, 3),
    half=st.integers(1, 4),
)
def test_gradients_of_what_is_read_off_the_outputs(batch: int, tokens: int, of_q: int, of_k: int, half: int) -> None:
    generator = torch.Generator().manual_seed(batch + tokens)
    width = 2 * half
    cos, sin = angles(tokens, width, torch.float64)
    xs = [torch.randn(batch, tokens, n * width, generator=generator, dtype=torch.float64) for n in (of_q, of_k)]
    ws = [torch.rand(n * width, generator=generator, dtype=torch.float64) + 0.5 for n in (of_q, of_k)]
    upper = [torch.randn(batch, n, tokens, width, generator=generator, dtype=torch.float64) for n in (of_q, of_k)]

    def step(rotate: Callable[..., tuple[Tensor, Tensor]], kept: bool) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in xs]
        weights = [w.clone().requires_grad_() for w in ws]
        ys = [Keeping.apply(x, w) if kept else x * w for x, w in zip(inputs, weights, strict=True)]
        q, k = rotate(*(heads(y, width) for y in ys), cos, sin)
        found = [q.detach().clone(), k.detach().clone()]
        torch.autograd.backward([q, k], [one.clone() for one in upper])
        return [
            *found,
            *(x.grad for x in inputs if x.grad is not None),
            *(w.grad for w in weights if w.grad is not None),
        ]

    wanted = step(modeling_llama.apply_rotary_pos_emb, kept=False)
    found = step(lambda q, k, cos, sin: turned(q, k, cos, sin, turn), kept=True)
    assert len(found) == len(wanted) == 6
    for one, own in zip(found, wanted, strict=True):
        assert torch.allclose(one, own, rtol=1e-12, atol=1e-12)


def test_a_second_backward_is_refused() -> None:
    cos, sin = angles(2, 4, torch.float32)
    q, k = (torch.ones(1, 2, 4, requires_grad=True) for _ in range(2))
    first, second = turned(*(heads(Keeping.apply(x, torch.ones(4)), 4) for x in (q, k)), cos, sin, turn)
    total = first.sum() + second.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        total.backward()


def test_what_is_kept_is_seen_through_views() -> None:
    y = Keeping.apply(torch.ones(2, 3, 8, requires_grad=True), torch.ones(8))
    assert is_kept(y) and is_kept(heads(y, 4)) and is_kept(y.view(2, 3, 2, 4).permute(0, 2, 1, 3)[:, :1])
    assert is_kept(y.split(4, dim=-1)[1])
    assert (
        not is_kept(y + 0) and not is_kept(heads(y * 1, 4)) and not is_kept(y.detach()) and not is_kept(torch.ones(1))
    )


def test_which_way_is_taken() -> None:
    calls: list[str] = []

    def named(name: str) -> Callable[..., Any]:
        def function(q: Tensor, k: Tensor, *rest: Any, back: bool = False, **others: Any) -> tuple[Tensor, Tensor]:
            calls.append(name + (" its own memory" if q is plain or q is kept else ""))
            return q.view_as(q), k.view_as(k)

        return function

    x = torch.ones(1, 2, 4, device="meta", requires_grad=True)  # as on a GPU: no CPU
    plain, kept = heads(x * 1, 4), heads(Keeping.apply(x, torch.ones(4, device="meta")), 4)
    known = Rotary(named("own"), named("kernel"), named("turn"))
    other = Rotary(named("own"), named("kernel"))
    angle = torch.ones(1, 2, 4, device="meta")
    known(plain, plain, angle, angle)
    known(kept, kept, angle, angle)
    known(kept, kept, angle, angle, unsqueeze_dim=1)
    other(kept, kept, angle, angle)
    known(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), *[torch.ones(1, 2, 4)] * 2)
    other(kept, k=plain, both=angle)  # as Llama 4's, of three
    other(q=plain, k=plain, both=angle)
    assert calls == [
        "kernel its own memory",
        "turn its own memory",
        "kernel",
        "kernel",
        "own",
        "kernel",
        "kernel its own memory",
    ]


def peqa_gradients(model: LlamaForCausalLM) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@KERNELS
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 8), (3, 7, 2, 20)])
def test_liger_kernels_turn_in_place_and_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, tokens, of_q, width = shape
    generator = torch.Generator().manual_seed(tokens)
    ys = [torch.randn(batch, tokens, n * width, generator=generator).to(DEVICE, dtype) for n in (of_q, 1)]
    given = [y.clone() for y in ys]
    cos, sin = (one.to(DEVICE, dtype) for one in angles(tokens, width, torch.float32))
    wanted = modeling_llama.apply_rotary_pos_emb(*(heads(y.double(), width) for y in ys), cos.double(), sin.double())
    found = liger_turn(*(heads(y, width) for y in ys), cos, sin, back=False)
    for y, one, own in zip(ys, found, wanted, strict=True):
        assert one.data_ptr() == y.data_ptr() and (one.double() - own).norm() <= TOLERANCES[dtype] * own.norm()
    liger_turn(*found, cos, sin, back=True)
    for y, own in zip(ys, given, strict=True):
        assert (y.double() - own.double()).norm() <= TOLERANCES[dtype] * own.double().norm()


@pytest.mark.parametrize("rotate", [turn, pytest.param(liger_turn, marks=KERNELS)])
@pytest.mark.parametrize("recompute", [False, True])
def test_scales_of_rows_train_alike(
    rotate: Turn, recompute: bool, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEQA's q and k, one scale a row: with a kernel that overwrites alone they would learn from R Y."""
    model: LlamaForCausalLM = tiny_llama.requires_grad_(False).to(DEVICE)
    method = Peqa(PeqaOptions.model_validate({"name": "peqa", "init": "rtn", "weight": {"format": "int4"}}))
    method.prepare(model, compute_dtype=torch.float32, device=DEVICE)
    assert method.keeps_outputs
    model.train()
    if recompute:
        Recompute(model).set("full")
    wanted = peqa_gradients(model)
    distance = {}
    for name, function in (
        ("kept", lambda q, k, cos, sin: turned(q, k, cos, sin, rotate) if is_kept(q) else None),
        ("overwritten", InPlace.apply),
    ):
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", function)
        layers = packed_layers(model).values()
        for layer in layers:
            assert layer.guard.seen  # in the first backward, and no more
            layer.guard = KeptOutput()
        if name == "overwritten":
            with pytest.raises(ModelError, match="written over before"):
                peqa_gradients(model)
            for layer in layers:
                layer.guard.seen = True
        found = peqa_gradients(model)
        assert found.keys() == wanted.keys()
        distance[name] = {n: float((found[n] - own).norm() / own.norm()) for n, own in wanted.items()}
    assert max(distance["kept"].values()) <= 1e-5
    harmed = {n.split(".")[-2] for n, far in distance["overwritten"].items() if far > 0.05}
    assert harmed == {"q_proj", "k_proj"}


class InPlace(torch.autograd.Function):
    """As liger-kernel's."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return turn(q, k, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return (*turn(*(gradient.clone() for gradient in gradients), *ctx.saved_tensors, back=True), None, None)
