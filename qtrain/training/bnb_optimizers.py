"""bitsandbytes' optimizers with a step that takes the host a tenth of the time.

bitsandbytes (0.50) waits for the GPU behind every parameter, asks the driver to fetch its pages, and goes through a
registered operation and a dozen Python frames to a kernel of 14 us. A 7B Llama with adapters on all layers has 448
parameters, and the GPU has nothing to do meanwhile: some 50 of 480 ms a step (an H200).
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from bitsandbytes.optim import optimizer as upstream
from torch import Tensor

KNOWN = "0.50."
"""Versions whose kernels take the arguments that ``arguments`` gives; others go bitsandbytes' own way."""
ROOM = 0.1
"""Share of the GPU's memory that is free where no pages have to be fetched."""
_POINTER, _REAL, _INT = ctypes.c_void_p, ctypes.c_float, ctypes.c_int32
TYPES = (*[_POINTER] * 4, *[_REAL] * 5, _INT, _REAL, *[_POINTER] * 4, *[_REAL] * 2, ctypes.c_bool, _INT)
"""Of the kernel's arguments. Made by ctypes from plain numbers they take 3 us, made one by one in Python 12."""
Kernels = Mapping[torch.dtype, Callable[..., Any]]


class _ShortWay:
    """Kernels of one stream run in order, on paged states too: the host launches them and goes on.

    It waits where it reads managed memory itself, in ``state_dict``, and goes bitsandbytes' way on another stream than
    the default one, on which those kernels run.
    """

    _kernels: Kernels | None = None
    _roomy = False
    _device: torch.device | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; what ``closure`` gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        on_gpu = torch.cuda.is_available()
        if not hasattr(upstream, "sync_gpu") or (on_gpu and torch.cuda.current_stream() != torch.cuda.default_stream()):
            super().step()  # type: ignore[misc]
            return loss
        if on_gpu:
            free, whole = torch.cuda.mem_get_info()
            overridden = self.mng.index2config or self.mng.pid2config  # type: ignore[attr-defined]
            self._roomy, self._kernels = free > ROOM * whole, None if overridden else adam_kernels()
            self._device = torch.device("cuda", torch.cuda.current_device())
        try:
            with mock.patch.object(upstream, "sync_gpu", lambda tensor: None):
                super().step()  # type: ignore[misc]
        finally:
            self._roomy, self._kernels = False, None
        return loss

    def prefetch_state(self, p: Tensor) -> None:
        """Bring pages of a parameter's state to the GPU, where they may have left it."""
        if not self._roomy:
            super().prefetch_state(p)  # type: ignore[misc]

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Launch the update of one parameter."""
        state, gradient = self.state[p], p.grad  # type: ignore[attr-defined]
        kernel = None if self._kernels is None or p.device != self._device else self._kernels.get(p.dtype)
        if (
            kernel is None
            or gradient is None
            or not (gradient.dtype == p.dtype and gradient.is_contiguous() and p.is_contiguous())
            or state["state1"].dtype != torch.uint8
        ):
            super().update_step(group, p, gindex, pindex)  # type: ignore[misc]
            return
        state["step"] += 1
        kernel(*arguments(p, gradient, state, group, self.args.skip_zeros))  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """After what was launched."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        return found


class AdamW8bit(_ShortWay, bnb.optim.AdamW8bit):
    """States of 8 bits."""


class PagedAdamW8bit(_ShortWay, bnb.optim.PagedAdamW8bit):
    """The same, which move to the host's memory where the GPU's does not suffice."""


class PagedAdamW32bit(_ShortWay, bnb.optim.PagedAdamW32bit):
    """States of 32 bits, paged."""


@cache
def adam_kernels() -> Kernels | None:
    """By the parameter's dtype; None for another version of bitsandbytes, or another make of GPU."""
    if torch.version.cuda is None or not version("bitsandbytes").startswith(KNOWN):
        return None
    from bitsandbytes.backends.cuda.ops import str2optimizer8bit_blockwise  # loads a library

    kernels: Any = str2optimizer8bit_blockwise["adam"]
    if any(inspect.isfunction(kernel) for kernel in kernels):  # which says, if it is called, what library is missing
        return None
    prototype = ctypes.CFUNCTYPE(None, *TYPES)
    places = [ctypes.cast(kernel, ctypes.c_void_p).value for kernel in kernels]
    found = [prototype(place) for place in places if place is not None]
    return dict(zip((torch.float32, torch.float16, torch.bfloat16), found, strict=True))


def detour_words(name: str, device: torch.device) -> str:
    """``, launched by bitsandbytes' own loop: ...`` where the short way is not taken on a GPU; else nothing."""
    if "adamw_8bit" not in name or device.type != "cuda" or adam_kernels() is not None:
        return ""
    return f", launched by bitsandbytes' own loop: {version('bitsandbytes')} is not {KNOWN}x with its CUDA library"


def arguments(
    p: Tensor, gradient: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], skip_zeros: bool
) -> tuple[Any, ...]:
    """What the kernel of 8-bit AdamW in blocks takes, in its order: values of ``TYPES``, which ctypes makes of them."""
    first, second = group["betas"]
    return (
        *(p.data_ptr(), gradient.data_ptr(), state["state1"].data_ptr(), state["state2"].data_ptr()),
        *(first, second, 0.0, group.get("alpha", 0.0), group["eps"], state["step"], group["lr"]),
        *(state["qmap1"].data_ptr(), state["qmap2"].data_ptr()),
        *(state["absmax1"].data_ptr(), state["absmax2"].data_ptr()),
        *(group["weight_decay"], 1.0, skip_zeros, p.numel()),
    )
