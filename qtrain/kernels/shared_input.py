"""What several layers make of one input, made once: q, k and v are given the same one, gate and up too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import Variable

T = TypeVar("T")
_ALL: WeakSet[Latest[Any]] = WeakSet()


class Latest(Generic[T]):
    """What was made last of a tensor.

    The tensor is held until another one comes, so that nothing else can lie where it lies; its version tells whether
    it was written to.
    """

    def __init__(self) -> None:
        self._source: tuple[Tensor, int, str] | None = None
        self._made: T | None = None
        _ALL.add(self)

    def of(self, x: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
        """``make(x)``, or what it gave for this content of x under this name.

        While a CUDA graph is captured nothing is shared: a replay would find what was made outside of it, and stale.
        """
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return make(x)
        if self._made is None or self._source is None or not _same(x, name, *self._source):
            self._source, self._made = (x, _version(x), name), make(x)
        return self._made

    def clear(self) -> None:
        """Hold nothing."""
        self._source = self._made = None


def _same(x: Tensor, name: str, known: Tensor, version: int, made: str) -> bool:
    return (
        name == made
        and x.data_ptr() == known.data_ptr()
        and x.shape == known.shape
        and x.stride() == known.stride()
        and x.dtype == known.dtype
        and x.grad_fn is known.grad_fn
        and _version(x) == version
    )


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


_CASTS: Latest[Tensor] = Latest()


def cast_for_product(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on: what a consumer of that dtype would quantize."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x
    dtype = torch.get_autocast_dtype(kind)
    if x.dtype == dtype:
        return x
    if torch.compiler.is_compiling():
        return x.to(dtype)
    # With and without gradients the cast is not the same: only one of them has a graph.
    return _CASTS.of(x, f"{dtype}, {torch.is_grad_enabled()}", lambda x: x.to(dtype))


def forget_casts() -> None:
    """Called by every backward: a cast holds a graph. What else was made of inputs is shared until all of it is over.

    While a CUDA graph is captured nothing is held that could be let go, and a replay calls nothing.
    """
    if torch.compiler.is_compiling():
        return
    _CASTS.clear()
    if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        Variable._execution_engine.queue_callback(forget_inputs)


def forget_inputs() -> None:
    """Hold no input, nor what was made of it: up to hundreds of MB that the head or the optimizer could have.

    A pass that failed leaves its graph here too.
    """
    if not torch.compiler.is_compiling():
        for latest in _ALL:
            latest.clear()
