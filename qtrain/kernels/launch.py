"""Launches of Triton kernels that find what was compiled for such arguments by one look-up.

Triton works out anew at each launch what its arguments mean for the compiled code: 20 to 110 us of the host, which are
longer than the kernel itself where tensors are small. A layer of QAT launches thirty, and training of 1B parameters on
an H200 with 16 virtual cores waited for the host for a fifth of each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

Variant = tuple[CompiledKernel, tuple[Any, ...]]
"""What was compiled, and the constants behind its other arguments."""

_KNOWN: dict[tuple[Any, ...], Variant] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, on the current stream of the current device.

    Args:
        args: leading ones in the kernel's order, all that is not compiled in: tensors, descriptors of such, numbers.
        constants: what is compiled in, and Triton's own options.

    Raises:
        TypeError: a number among ``args`` is compiled in.
    """
    if not _looks_up(kernel):
        kernel[grid](*args, **constants)
        return
    kinds, values = _looked_at(args)
    key = _key(kernel, kinds, constants)
    known = _KNOWN.get(key)
    if known is None:
        found = kernel[grid](*args, **constants)
        if isinstance(found, CompiledKernel):
            _remember(key, kernel, found, args, constants)
        return
    compiled, rest = known
    compiled[(*grid, 1, 1)[:3]](*values, *rest)


class Prepared:
    """A launch that is made again and again with one other tensor: the rest is looked at once.

    It holds addresses and no memory; whoever keeps it knows that all still lies there.

    Args:
        changing: which of ``args`` is another one each time, on a multiple of 16 bytes as this one is.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], changing: int, **constants: Any
    ) -> None:
        self._grid, self._changing = (*grid, 1, 1)[:3], changing
        self._looks_up = _looks_up(kernel) and args[changing].data_ptr() % 16 == 0
        if self._looks_up:
            kinds, self._values = _looked_at(args)
            self._key = _key(kernel, kinds, constants)
            self._device = torch.cuda.current_device()

    def __call__(self, changing: Tensor) -> bool:
        """Launch it; False, and nothing done, where ``launch`` has to: the first time, or for another kind of place."""
        if not self._looks_up:
            return False
        known, place = _KNOWN.get(self._key), changing.data_ptr()
        if known is None or place % 16 or torch.cuda.current_device() != self._device:
            return False
        self._values[self._changing] = place
        compiled, rest = known
        compiled[self._grid](*self._values, *rest)
        return True


def _looks_up(kernel: Any) -> bool:
    """Not in Triton's interpreter; and for AMD's GPUs it knows more of a tensor: whether it is below 2 GB."""
    return isinstance(kernel, JITFunction) and torch.version.hip is None


def _key(kernel: Any, kinds: list[Any], constants: dict[str, Any]) -> tuple[Any, ...]:
    # Kernels live as long as their modules, so none lies where another lay.
    return id(kernel), torch.cuda.current_device(), *kinds, *constants.items()


def _looked_at(args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The kind of each argument, and what stands for it: Triton takes addresses, which it would ask tensors for."""
    kinds, values = [], []
    for value in args:
        if isinstance(value, Tensor):
            place = value.data_ptr()
            # A tensor elsewhere is of another kind, for Triton to refuse.
            kinds.append((value.dtype, place % 16 == 0, value.get_device()))
            values.append(place)
        else:
            kinds.append(_kind(value))
            values.append(value)
    return kinds, values


def _kind(value: Any) -> Any:
    """All that compiled code knows of a number or a descriptor: its type, and of integers whether 16 divides them.

    What it is compiled for by value, or Triton knows in another way, stands for itself.
    """
    kind = type(value)
    if kind is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63
    if kind is float:
        return float
    if kind is TensorDescriptor:
        return value.base.dtype, *value.block_shape, value.padding
    return value


def _remember(
    key: tuple[Any, ...], kernel: Any, found: CompiledKernel, args: Sequence[Any], constants: dict[str, Any]
) -> None:
    names = kernel.arg_names
    for name, value, parameter in zip(names, args, kernel.params, strict=False):
        if parameter.is_constexpr and isinstance(value, int | float):
            raise TypeError(f"{name} of {kernel.__name__} is compiled in: it is given by name")
    rest = names[len(args) :]
    if all(name in constants for name in rest):  # others have defaults, which Triton fills in
        _KNOWN[key] = found, tuple(constants[name] for name in rest)
