"""What blocks of layers that train share: how they are found, proven equal to their layers, and when they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.modules.block_proof import DIFFERS, TOLERANCES, farthest

Context = Callable[[], AbstractContextManager[Any]]
Run = Callable[[Tensor], tuple[Tensor, ...] | None]
WATCHED = "a hook watches"


def gated_names(parent: nn.Module, groups: Sequence[Sequence[tuple[str, Tensor]]], kind: type) -> list[str] | None:
    """Of gate, up and down where ``parent`` looks like down(silu(gate(x)) * up(x)); a comparison tells whether it is.

    Args:
        groups: its layers of that kind, those together that are given the same tensor.
    """
    by_size = sorted(groups, key=lambda group: -len(group))
    rest = [child for child in parent.children() if not isinstance(child, kind)]
    # liger-kernel's MLP has no module for its activation.
    if [len(group) for group in by_size] != [2, 1] or len(rest) > 1 or not all(map(_is_silu, rest)):
        return None
    pair = sorted((name for name, _ in by_size[0]), key=lambda name: "gate" not in name)
    return [*pair, by_size[1][0][0]]


def _is_silu(act: nn.Module) -> bool:
    x = torch.linspace(-30, 30, 241, device="cpu")
    if next(act.parameters(), None) is not None:
        return False
    with torch.no_grad():
        return torch.equal(act(x), F.silu(x))


def why_not_equal(alone: Run, block: Run, trained: Sequence[Tensor], like: Tensor, context: Context) -> str | None:
    """What keeps a block from being its layers but for rounding, in words; None where nothing does.

    Args:
        trained: whose gradients are compared beside those of the input.
        like: an input as the layers are given it; the comparison draws another.
    """
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like.device, like.dtype)
    wanted = _outcome(alone, trained, x, context)
    try:
        found = _outcome(block, trained, x, context)
    except Exception as error:  # a compiler that is not there, a chip a kernel does not fit: anything
        return f"kernels that do not run here ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
    if wanted is None or found is None:
        return WATCHED
    tolerance = TOLERANCES[torch.bfloat16 if wanted[0].dtype == torch.bfloat16 else torch.float32]
    outputs = len(found) - 1 - sum(one.requires_grad for one in trained)
    names = ["y"] * outputs + ["dL/dx"] + ["the gradient of what trains"] * (len(found) - 1 - outputs)
    name, far = farthest(found, wanted, names)
    return None if far <= tolerance else f"{DIFFERS} ({name})"


def _outcome(run: Run, trained: Sequence[Tensor], x: Tensor, context: Context) -> list[Tensor] | None:
    """Outputs, and gradients of x and of what trains."""
    x = x.clone().requires_grad_()
    with torch.enable_grad(), context():
        ys = run(x)
    if ys is None:
        return None
    generator = torch.Generator().manual_seed(1)
    upper = [torch.randn(y.shape, generator=generator, device="cpu").to(y.device, y.dtype) for y in ys]
    return [*ys, *torch.autograd.grad(ys, (x, *(one for one in trained if one.requires_grad)), upper)]


def exchanged(parent: nn.Module, names: Sequence[str], layers: Sequence[nn.Module], kind: type) -> bool:
    """Whether other modules stand there by now, or the same of another class, as after ``convert``."""
    there = (parent._modules.get(name) for name in names)
    return any(one is not own or not isinstance(own, kind) for one, own in zip(there, layers, strict=True))
