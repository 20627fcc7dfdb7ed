"""Block inputs that wait for the backward in pinned host memory, copied beside the computation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SMALLEST = 2**20
"""Bytes below which a tensor stays where it is: a copy's start costs more than it frees."""


class _Copy:
    """A tensor on the host, and on its way back."""

    def __init__(self, host: Tensor, device: torch.device, previous: weakref.ref[_Copy] | None) -> None:
        self.host, self.device, self.previous = host, device, previous
        self.back: Tensor | None = None
        self.arrived: torch.Event | None = None


class OffloadedInputs:
    """Runs a function as a checkpoint whose inputs are kept on the host; one for all layers of a model.

    Both ways run on a stream of their own. When a layer's input is asked for, that of the layer before it sets out too
    and arrives while this one is computed. Host memory is plain pinned memory, which torch's allocator keeps for the
    next step; managed memory would be moved by page faults, in the way of the computation.

    Args:
        smallest: bytes below which a tensor stays where it is.
    """

    def __init__(self, smallest: int = SMALLEST) -> None:
        self.smallest = smallest
        self._last: weakref.ref[_Copy] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), its activations dropped."""
        # The hooks see what the checkpoint saves: its inputs. Within the function its own hooks take their place.
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(function, *args, use_reentrant=False)

    def _pack(self, tensor: Tensor) -> Tensor | _Copy:
        if not tensor.is_floating_point() or tensor.nbytes < self.smallest:
            return tensor
        on_gpu = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        if on_gpu:
            side = self._side(tensor.device)
            side.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(side):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(side)  # its memory is not given away before it is read
        else:
            host.copy_(tensor)
        copy = _Copy(host, tensor.device, self._last)
        self._last = weakref.ref(copy)
        return copy

    def _unpack(self, kept: Tensor | _Copy) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._send(kept)
        before = None if kept.previous is None else kept.previous()
        if before is not None:
            self._send(before)
        tensor, kept.back = kept.back, None
        assert tensor is not None
        if kept.arrived is not None:
            current = torch.cuda.current_stream(kept.device)
            kept.arrived.wait(current)
            tensor.record_stream(current)
        return tensor

    def _send(self, copy: _Copy) -> None:
        if copy.back is not None:
            return
        if copy.device.type != "cuda":
            copy.back = copy.host.to(copy.device)
            return
        side = self._side(copy.device)
        with torch.cuda.stream(side):
            copy.back = copy.host.to(copy.device, non_blocking=True)
            copy.arrived = torch.Event(copy.device)
            copy.arrived.record(side)

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
