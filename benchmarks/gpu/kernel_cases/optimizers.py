"""Steps of AdamW on the largest weight of a layer, in 16 bits and in 8."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor, nn

from benchmarks.gpu.kernel_cases.case import DEVICE, DTYPE, Case, Run, Sizes, only_on_a_gpu, tiles
from qtrain.kernels import adamw as sixteen
from qtrain.kernels import adamw8 as eight

RATES = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
KEYS = (1, 2)


def adamw(size: Sizes) -> Iterator[Case]:
    """w, g, m, v in bf16: four reads and three writes."""
    shape = (size.intermediate, size.hidden)
    step = sixteen.AdamWStep.of(1, **RATES)

    def tensors() -> list[Tensor]:
        torch.manual_seed(0)
        w, g = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(2))
        return [w, g, torch.zeros_like(w), torch.zeros_like(w)]

    def ours() -> Run:
        kernel, parts = tiles("adamw_tiles"), tensors()

        def run() -> Tensor:
            kernel.adamw_(*parts, step, KEYS, None)
            return parts[0]

        return run

    own = tensors()

    def plain() -> Tensor:
        sixteen.plain_(*own, step, KEYS)
        return own[0]

    def torch_fused() -> Run:
        weight, gradient, *_ = tensors()
        return _stepping(torch.optim.AdamW, nn.Parameter(weight), gradient, fused=True)

    moved = 7 * DTYPE.itemsize * shape[0] * shape[1]
    what = f"a step, {shape[0]} x {shape[1]}, all in {str(DTYPE).removeprefix('torch.')}"
    # The plain twin goes chunk by chunk: compiled it would be hundreds of kernels.
    yield Case(what, moved, ours, plain, compiled=False, peers={"torch, fused (to nearest)": torch_fused})


def adamw8(size: Sizes) -> Iterator[Case]:
    """w and g in fp32, both moments as codes of a byte."""
    shape = (size.intermediate, size.hidden)
    count, step = shape[0] * shape[1], eight.AdamW8Step.of(1, **RATES)
    maps = eight.Maps.of(*(create_dynamic_map(signed=signed).to(DEVICE) for signed in (True, False)))

    def tensors() -> eight.Parts:
        torch.manual_seed(0)
        weight, gradient = (torch.randn(count, device=DEVICE) for _ in range(2))
        codes = (torch.full((count,), number, dtype=torch.uint8, device=DEVICE) for number in (127, 0))
        absmax = (torch.zeros(-(-count // eight.BLOCK), device=DEVICE) for _ in range(2))
        return eight.Parts(weight, gradient, *codes, *absmax)

    def ours() -> Run:
        tiles("adamw8_tiles")
        parts = tensors()
        known = eight.Tensors([parts])

        def run() -> Tensor:
            known.step_([parts.gradient], step, maps)
            return parts.weight

        return run

    own = tensors()

    def plain() -> Tensor:
        eight.plain_(own, step, maps)
        return own.weight

    def peer() -> Run:
        only_on_a_gpu()
        weight, gradient, *_ = tensors()
        return _stepping(bnb.optim.AdamW8bit, nn.Parameter(weight), gradient)

    moved = 16 * count + 16 * -(-count // eight.BLOCK)
    what = f"a step, {shape[0]} x {shape[1]}, weights in fp32"
    yield Case(what, moved, ours, plain, compiled=False, peers={"bitsandbytes": peer})


def _stepping(cls: type[torch.optim.Optimizer], weight: nn.Parameter, gradient: Tensor, **options: bool) -> Run:
    weight.grad = gradient
    return cls([weight], **RATES, **options).step
