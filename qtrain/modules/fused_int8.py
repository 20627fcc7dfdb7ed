"""Fake-quantized layers of bytes that run as one block in training: those that share an input, gated MLPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.kernels.int8_blocks import ByteLinear, int8_mlp, int8_products
from qtrain.modules.block_call import block_input
from qtrain.modules.block_parts import WATCHED, exchanged, gated_names, why_not_equal
from qtrain.modules.eval_mode import eval_mode
from qtrain.modules.fused_layers import watched
from qtrain.modules.kernel_keys import PRODUCTS
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.shared_inputs import PROBE_TOKENS, by_parent, inputs_of
from qtrain.modules.shared_outputs import SharedOutputs

Context = Callable[[], AbstractContextManager[Any]]


def fuse_int8(model: PreTrainedModel, context: Context) -> str:
    """Let layers that share an input, and gated MLPs, be one autograd function each in training, in place.

    Only what multiplies bytes (``QuantLinear.kernels`` is int8 or fp8). Each kind of block is compared with its layers
    first.

    Args:
        context: what training runs in, such as its autocast.

    Returns:
        What runs fused, and what does not and why, in words.
    """
    alone: Counter[str] = Counter()
    blocks: Counter[str] = Counter()
    with eval_mode(model):
        try:
            inputs = inputs_of(model, QuantLinear, context)
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            return f"layer by layer: no forward pass of {PROBE_TOKENS} tokens ({' '.join(str(error).split())[:80]})"
        for parent, groups in by_parent(model, QuantLinear, inputs, alone).items():
            for block, x in _candidates(parent, [list(group.items()) for group in groups]):
                why = _why_not(block, x, context)
                if why is not None and isinstance(block, GatedBytes):
                    block = block.pair
                    why = _why_not(block, x, context)
                if why is None:
                    block.install()
                    blocks[block.label] += 1
                else:
                    alone[why] += len(block.layers)
    words = " and ".join(f"{count} {name}" for name, count in blocks.items()) or "no layers"
    return f"{words} as one function" + "".join(f"; {count} layers alone: {why}" for why, count in alone.items())


@dataclass
class SharedBytes:
    """Layers of one module that are given the same tensor: the first of them that is called computes for all."""

    parent: nn.Module
    names: list[str]
    layers: list[QuantLinear]
    _shared: SharedOutputs = field(default_factory=SharedOutputs, repr=False)

    @property
    def label(self) -> str:
        """``QKV``, or ``gate+up``."""
        short = [name.removesuffix("_proj") for name in self.names]
        return "".join(short).upper() if all(len(name) == 1 for name in short) else "+".join(short)

    def install(self) -> None:
        """Take the place of the layers' forwards."""
        for index, layer in enumerate(self.layers):
            object.__setattr__(layer, "forward", _Turn(self, index))

    def alone(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of each by itself."""
        return tuple(QuantLinear.forward(layer, x) for layer in self.layers)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """Of all by the block; None where it does not run."""
        if exchanged(self.parent, self.names, self.layers, QuantLinear) or _not_ready(self.layers):
            return None
        quantizer, first = self.layers[0].input_quantizer, self.layers[0]
        assert quantizer is not None
        linears = [_linear(layer) for layer in self.layers]
        return int8_products(x, linears, input_key=quantizer.rule.key, bytes_backward=first.byte_gradient)

    def output(self, index: int, x: Tensor) -> Tensor | None:
        """Of one of the layers; None where the block does not run."""
        return self._shared.take(index, x, self.outputs)


@dataclass
class _Turn:
    block: SharedBytes
    index: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = block_input(args, kwargs)
        y = None if x is None else self.block.output(self.index, x)
        layer = self.block.layers[self.index]
        return type(layer).forward(layer, *args, **kwargs) if y is None else y  # after ``convert`` it is a plain one


@dataclass
class GatedBytes:
    """down(silu(gate(x)) * up(x)) of a module that does nothing else.

    Attributes:
        names, layers: gate, up and down.
        forward: the module's own.
    """

    mlp: nn.Module
    names: list[str]
    layers: list[QuantLinear]
    forward: Callable[..., Any]
    label: str = "MLP"

    @property
    def pair(self) -> SharedBytes:
        """Gate and up alone."""
        return SharedBytes(self.mlp, self.names[:2], self.layers[:2])

    def install(self) -> None:
        """Take the place of the module's forward."""
        object.__setattr__(self.mlp, "forward", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = block_input(args, kwargs)
        ys = None if x is None else self.outputs(x)
        return self.forward(*args, **kwargs) if ys is None else ys[0]

    def alone(self, x: Tensor) -> tuple[Tensor, ...]:
        """By the module's own forward."""
        return (self.forward(x),)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """By the block; None where it does not run."""
        if exchanged(self.mlp, self.names, self.layers, QuantLinear) or any(
            watched(child) for child in self.mlp.children()
        ):
            return None
        gate, up, down = self.layers
        if _not_ready([gate, up]) or _not_ready([down]):
            return None
        first, last = gate.input_quantizer, down.input_quantizer
        assert first is not None and last is not None
        y = int8_mlp(
            x,
            [_linear(layer) for layer in self.layers],
            input_key=first.rule.key,
            hidden_key=last.rule.key,
            bytes_backward=gate.byte_gradient,
        )
        return (y,)


Block = SharedBytes | GatedBytes


def _candidates(parent: nn.Module, groups: Sequence[list[tuple[str, Tensor]]]) -> list[tuple[Block, Tensor]]:
    """Blocks of a module, with an input: a gated MLP as a whole, or else its layers that share one."""
    layers = {name: layer for name, layer in parent.named_children() if isinstance(layer, QuantLinear)}
    names = gated_names(parent, groups, QuantLinear)
    if names is not None:
        x = next(x for group in groups for name, x in group if name == names[0])
        return [(GatedBytes(parent, names, [layers[name] for name in names], parent.forward), x)]
    shared = [([name for name, _ in group], group[0][1]) for group in groups if len(group) > 1]
    return [(SharedBytes(parent, names, [layers[name] for name in names]), x) for names, x in shared]


def _why_not(block: Block, like: Tensor, context: Context) -> str | None:
    """What keeps a block from being its layers but for rounding, in words."""
    if why := _not_ready(block.layers[:2]):
        return why
    why = why_not_equal(block.alone, block.outputs, [layer.weight for layer in block.layers], like, context)
    return _not_ready(block.layers[-1:]) or why if why == WATCHED else why


def _not_ready(layers: Sequence[QuantLinear]) -> str | None:
    """Why layers of one input are not multiplied as bytes together, as they are by now."""
    keys = set()
    for layer in layers:
        if layer.kernels not in PRODUCTS:
            return "method.kernels is neither int8 nor fp8"
        if watched(layer):
            return WATCHED
        if layer.lora_A is not None:
            return "adapters inside"
        if why := layer.lacks_product(layer.kernels):
            return why
        for_weight, for_input = layer.quantizers()
        assert for_weight is not None and for_input is not None  # else there were no product
        if not for_weight.ready or not for_input.ready:
            return "ranges that are not found yet"
        keys.add(for_input.rule.key)
    return None if len(keys) == 1 else "inputs of one are quantized otherwise"


def _linear(layer: QuantLinear) -> ByteLinear:
    quantizer, _ = layer.quantizers()
    assert quantizer is not None
    scale, _ = quantizer.range_tensors()
    return ByteLinear(layer.weight, scale, layer.bias, quantizer.rule.key)
