"""Decoder layers as CUDA graphs: one launch a layer and direction in place of hundreds.

A fake-quantized layer of 576 channels takes 240 kernels of 7 us; the CPU launches one in 25 us (SmolLM2-135M, W4 g64,
H200: 51 ms of kernels in a step of 167 ms).
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers.modeling_layers import GradientCheckpointingLayer

Capture = Callable[[tuple[nn.Module, ...], tuple[tuple[Tensor, ...], ...]], Sequence[Callable[..., Any]]]


@dataclass(frozen=True)
class Mode:
    """What decides, beside its arguments, which kernels a layer runs."""

    training: bool
    gradients: bool
    autocast: torch.dtype | None

    @classmethod
    def of(cls, layer: nn.Module, device: str) -> Mode:
        """That of now."""
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(layer.training, torch.is_grad_enabled(), autocast)


class Arguments:
    """The arguments of one call of a layer: tensors, of which another call may bring others of the same kind, and the
    rest, which is part of the graph."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.leaves, self.structure = tree_flatten((args, kwargs))

    @property
    def tensors(self) -> list[Tensor]:
        """In their order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def kinds(self) -> tuple[TreeSpec, list[object]]:
        """What another call must equal for a graph of this one to serve it."""
        return self.structure, [_kind(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]

    def copy(self) -> Arguments:
        """The same in memory of their own, and with no part in the pass that computed them.

        What is left of that pass would tie gradients to the stream it ran on, which a capture must not wait for.
        """
        new = copy.copy(self)
        new.leaves = [
            leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
            for leaf in self.leaves
        ]
        return new


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


class Slot(nn.Module):
    """A layer as a function of its tensors alone, in the mode in which it was seen.

    It is no part of the model: it only shows the layer's parameters to the capture.
    """

    def __init__(self, layer: nn.Module, arguments: Arguments, mode: Mode, device: str) -> None:
        super().__init__()
        self.layer, self.mode, self.device = layer, mode, device
        self.run = layer.forward
        self.structure: TreeSpec = arguments.structure
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in arguments.leaves]
        self.places = [at for at, leaf in enumerate(arguments.leaves) if isinstance(leaf, Tensor)]
        self.train(mode.training)

    def train(self, mode: bool = True) -> Slot:
        """Its own flag alone: the layer keeps its own."""
        self.training = mode
        return self

    def forward(self, *tensors: Tensor) -> Any:
        """The layer's output."""
        leaves = list(self.leaves)
        for at, tensor in zip(self.places, tensors, strict=True):
            leaves[at] = tensor
        args, kwargs = tree_unflatten(leaves, self.structure)
        with (
            torch.set_grad_enabled(self.mode.gradients),
            # A cast that is cached in one graph would be read by the next one, whose replay may come after a new step.
            torch.autocast(self.device, self.mode.autocast, self.mode.autocast is not None, cache_enabled=False),
        ):
            return self.run(*args, **kwargs)


class LayerGraphs:
    """The graphs of all decoder layers that one forward pass runs.

    ``capture`` watches that pass, captures every layer forward and backward, and puts the replay in the place of the
    layer's ``forward``. A call of another kind (a smaller last batch, evaluation) runs the layer as it is. Losses and
    gradients are those of the kernels that were captured; what Python decides from step to step is no longer asked.

    Attributes:
        calls: of layers since then: replayed, not replayed.
        reason: why none is.
    """

    def __init__(self, make: Capture | None = None) -> None:
        self._make = make or _capture
        self._layers: list[nn.Module] = []
        self.calls, self.reason = [0, 0], ""

    @property
    def count(self) -> int:
        """Layers that are replayed."""
        return len(self._layers)

    def __str__(self) -> str:
        return f"{self.count} layers, replayed" if self.count else f"none: {self.reason}"

    def try_to_capture(self, models: Sequence[nn.Module], forward: Callable[[], object], device: torch.device) -> None:
        """``capture``, where it can be done; else ``reason`` says why not, and all layers are as they were."""
        if device.type != "cuda":
            self.reason = f"{device.type} has none"
            return
        try:
            self.capture(models, forward, device.type)
        except RuntimeError as error:
            self.reason = str(error).strip().splitlines()[0]
            torch.cuda.synchronize(device)

    def capture(self, models: Sequence[nn.Module], forward: Callable[[], object], device: str = "cuda") -> None:
        """Watch ``forward``, which runs ``models`` as training will; then replace their layers.

        Raises:
            RuntimeError: something in a layer cannot be captured; all layers are as they were.
        """
        seen = _watch(models, forward, device)
        slots = tuple(Slot(layer, arguments, mode, device) for layer, arguments, mode in seen)
        samples = tuple(tuple(arguments.tensors) for _, arguments, _ in seen)
        gc.collect()
        # Gradients of the graphs belong to the stream of the capture, which torch warns of in each process once.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        try:
            replays = self._make(slots, samples)
        except BaseException:
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(True)
            raise
        for (layer, arguments, mode), slot, replay in zip(seen, slots, replays, strict=True):
            layer.forward = self._choose(layer, slot, arguments.kinds, mode, replay)
            self._layers.append(layer)

    def _choose(
        self,
        layer: nn.Module,
        slot: Slot,
        expected: tuple[TreeSpec, list[object]],
        mode: Mode,
        replay: Callable[..., Any],
    ) -> Callable[..., Any]:
        run, device, calls = slot.run, slot.device, self.calls

        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = Arguments(args, kwargs)
            if Mode.of(layer, device) == mode and arguments.kinds == expected:
                calls[0] += 1
                return replay(*arguments.tensors)
            calls[1] += 1
            return run(*args, **kwargs)

        return forward

    def release(self) -> None:
        """Layers run as they are again; the memory of the graphs goes with the last gradient that lies in it."""
        for layer in self._layers:
            del layer.forward
        if self._layers:
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(True)
        self._layers.clear()


def _capture(slots: tuple[nn.Module, ...], samples: tuple[tuple[Tensor, ...], ...]) -> Sequence[Callable[..., Any]]:
    with torch.autocast("cuda", enabled=False):
        graphed = torch.cuda.make_graphed_callables(slots, samples, allow_unused_input=True)
    return list(graphed)


def _watch(
    models: Sequence[nn.Module], forward: Callable[[], object], device: str
) -> list[tuple[nn.Module, Arguments, Mode]]:
    """The layers in the order in which they ran, each with its arguments."""
    seen: list[tuple[nn.Module, Arguments, Mode]] = []

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((layer, Arguments(args, kwargs).copy(), Mode.of(layer, device)))

    with _hooks(models, enter):
        forward()
    if len({id(layer) for layer, _, _ in seen}) < len(seen):
        raise RuntimeError("a layer runs more than once in a step: a graph has room for one set of activations")
    return seen


@contextmanager
def _hooks(models: Sequence[nn.Module], enter: Callable[..., None]) -> Iterator[None]:
    layers = [
        module for model in models for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
