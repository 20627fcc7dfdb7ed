"""Rotary embeddings that overwrite q and k, beside layers that keep what they gave for the backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Pair = tuple[Tensor, Tensor]
VIEWS = ("View", "Transpose", "Permute", "Slice", "Split", "Select", "Alias", "Reshape", "Squeeze", "Unsafe")
"""In the names of autograd nodes whose outputs lie in the memory of their inputs."""


class Turn(Protocol):
    """R of each token for q and k [B, H, n, D], or R^T, where they lie if their tokens lie together; R R^T = 1."""

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Pair: ...


@dataclass(eq=False)
class Rotary:
    """``apply_rotary_pos_emb`` of a modelling file, or its like: a kernel that overwrites where that does no harm.

    A layer that keeps its output Y would find R Y in its memory, and take a wrong gradient from it, which autograd
    does not see: a kernel's writes have no version. Its memory is turned back once the backward is done with R Y.

    Attributes:
        own: the modelling file's function, for the CPU.
        kernel: the same on a GPU, which overwrites.
        turn: what ``kernel`` computes of (q, k, cos, sin), and back; None where that is not known, and what such
            layers gave is copied.
    """

    own: Callable[..., Any]
    kernel: Callable[..., Any]
    turn: Turn | None = None

    def __post_init__(self) -> None:
        self.__signature__ = inspect.signature(self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        if all(one.device.type == "cpu" for one in tensors):
            return self.own(*args, **kwargs)
        if not any(map(is_kept, tensors)):
            return self.kernel(*args, **kwargs)
        if self.turn is not None and len(args) == 4 and not kwargs:
            return turned(*args, self.turn)
        return self.kernel(*map(_apart, args), **{name: _apart(one) for name, one in kwargs.items()})


def _apart(one: Any) -> Any:
    return one.clone() if isinstance(one, Tensor) and is_kept(one) else one


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> Pair:
    """R q and R k in the memory of q and k [B, H, n, D], which have their numbers again after the backward.

    But for rounding: two of them in the dtype of q and k. A graph is for one backward, as of SwiGLU in place.
    """
    pair: Pair = _Turned.apply(q, k, cos, sin, turn)  # type: ignore[no-untyped-call]
    return pair


def is_kept(x: Tensor) -> bool:
    """Whether x lies in the memory of an output that its layer keeps: its autograd node says ``keeps_output``."""
    node: Any = x.grad_fn
    while node is not None and any(view in type(node).__name__ for view in VIEWS) and node.next_functions:
        node = node.next_functions[0][0]
    return bool(getattr(node, "keeps_output", False))


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> Pair:
        q, k = turn(q, k, cos, sin, back=False)
        ctx.save_for_backward(q, k, cos, sin)  # no byte more: attention keeps both
        ctx.turn, ctx.done = turn, False
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        if ctx.done:
            raise RuntimeError(
                "a second backward through one forward: q and k have been turned back; model.fused=none keeps them"
            )
        q, k, cos, sin = ctx.saved_tensors
        ctx.turn(q, k, cos, sin, back=True)
        ctx.done = True
        d_q, d_k = ctx.turn(*gradients, cos, sin, back=True)
        return d_q, d_k, None, None, None
