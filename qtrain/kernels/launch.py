"""Launches of Triton kernels that find what was compiled for such arguments by one look-up.

Triton works out anew at each launch what its arguments mean for the compiled code: 20 to 110 us of the host, which are
longer than the kernel itself where tensors are small. A layer of QAT launches thirty, and training of 1B parameters on
an H200 with 16 virtual cores waited for the host for a fifth of each step.
"""

from __future__ import annotations

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
    # Triton's interpreter; and for AMD's GPUs it knows more of a tensor than ``_kind``: whether it is below 2 GB.
    if not isinstance(kernel, JITFunction) or torch.version.hip is not None:
        kernel[grid](*args, **constants)
        return
    # Kernels live as long as their modules, so none lies where another lay.
    key = id(kernel), torch.cuda.current_device(), *map(_kind, args), *constants.items()
    known = _KNOWN.get(key)
    if known is None:
        found = kernel[grid](*args, **constants)
        if isinstance(found, CompiledKernel):
            _remember(key, kernel, found, args, constants)
        return
    compiled, rest = known
    compiled[(*grid, 1, 1)[:3]](*args, *rest)


def _kind(value: Any) -> Any:
    """All that compiled code knows of an argument: types, and of addresses and integers whether 16 divides them.

    What it is compiled for by value, or Triton knows in another way, stands for itself.
    """
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    kind = type(value)
    if kind is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63
    if kind is float:
        return float
    if kind is TensorDescriptor:
        return value.base.dtype, *value.block_shape, value.padding
    return value


def _remember(
    key: tuple[Any, ...], kernel: Any, found: CompiledKernel, args: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    names = kernel.arg_names
    for name, value, parameter in zip(names, args, kernel.params, strict=False):
        if parameter.is_constexpr and isinstance(value, int | float):
            raise TypeError(f"{name} of {kernel.__name__} is compiled in: it is given by name")
    rest = names[len(args) :]
    if all(name in constants for name in rest):  # others have defaults, which Triton fills in
        _KNOWN[key] = found, tuple(constants[name] for name in rest)
