"""PEFT's LoRA linears with another forward in training: those that share an input together, a gated MLP as a whole.

Names, parameters and what PEFT does with them stay. Without gradients, with other adapters than those found at the
start, merged, or watched by a hook inside, a layer runs as PEFT has it; in training that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qtrain.kernels.gated import Activation
from qtrain.kernels.lora_part import FrozenWeight
from qtrain.kernels.lora_product import Compute, LoraLinear, lora_mlp, lora_products
from qtrain.modules.block_call import block_input
from qtrain.modules.shared_outputs import SharedOutputs
from qtrain.modules.told_once import ToldOnce

Forward = Callable[..., Any]


@dataclass
class Member:
    """One LoRA linear of a block.

    Attributes:
        name: in its parent.
        path: in the model.
        forward: PEFT's, by which it runs where the block does not.
    """

    name: str
    path: str
    parent: nn.Module
    layer: LoraLayer
    adapter: str
    frozen: FrozenWeight
    forward: Forward
    follows_input: bool = True  # else its outputs have the dtype of its products

    def why_not(self, dtype: torch.dtype) -> str | None:
        """In words what is not as it was when the block was made, or that products are in another dtype; or None."""
        layer = self.layer
        base = self._held("base_layer")
        if isinstance(base, BaseTunerLayer):  # an adapter over another one
            base = layer.get_base_layer()
        if isinstance(base, bnb.nn.Linear4bit) and base.compute_dtype != dtype:
            return f"products in {dtype}, and the base's are in {base.compute_dtype}"
        if layer.merged or layer.disable_adapters:
            return "its adapter is merged" if layer.merged else "its adapter is disabled"
        if list(layer.active_adapters) != [self.adapter]:
            return f"adapters {', '.join(layer.active_adapters)} in place of {self.adapter}"
        there: object = self.parent._modules.get(self.name)
        if there is not layer:
            return "another module stands there"
        inside = (base, *map(self._own, ("lora_A", "lora_B", "lora_dropout")))
        return "a hook watches inside" if any(map(watched, inside)) else None

    def linear(self) -> LoraLinear:
        """The adapter as it is by now."""
        a, b = self._own("lora_A").weight, self._own("lora_B").weight
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        return LoraLinear(self.frozen, a, b, float(self.layer.scaling[self.adapter]))

    @property
    def dropout_layer(self) -> nn.Module:
        """PEFT's own; the identity where nothing is dropped."""
        return self._own("lora_dropout")

    @property
    def dropout(self) -> float:
        """The share that is zeroed by now."""
        layer = self.dropout_layer
        return float(layer.p) if isinstance(layer, nn.Dropout) and layer.training else 0.0

    @property
    def device(self) -> torch.device:
        """Of the adapter."""
        return self.linear().a.device

    def _own(self, kind: str) -> nn.Module:
        """The adapter's part in one of the layer's dictionaries."""
        found = self._held(kind)._modules[self.adapter]
        assert found is not None
        return found

    def _held(self, name: str) -> nn.Module:
        """A module of the layer. Asked for in every forward: as an attribute it is looked for in four places."""
        found = cast(nn.Module, self.layer)._modules[name]
        assert found is not None
        return found


@dataclass
class SharedInput:
    """Linears of one module that are given the same tensor: the first of them that is called computes for all."""

    members: list[Member]
    told: ToldOnce = field(default_factory=ToldOnce, repr=False)
    _shared: SharedOutputs = field(default_factory=SharedOutputs, repr=False)

    def install(self) -> None:
        """Take the place of the layers' forwards."""
        for index, member in enumerate(self.members):
            object.__setattr__(member.layer, "forward", _Turn(self, index))

    def output(self, index: int, x: Tensor) -> Tensor | None:
        """Of one of the linears; None where the block does not run."""
        y = self._shared.take(index, x, self.outputs)
        member = self.members[index]
        if y is None and member.parent.training:
            self.told(f"{member.path} runs as PEFT has it", _compute(x, self.members))
        return y

    def alone(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of each by PEFT's forward."""
        return tuple(member.forward(x) for member in self.members)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """Of all by the block; None where it does not run."""
        compute = _compute(x, self.members)
        if isinstance(compute, str):
            return None
        return lora_products(x, [member.linear() for member in self.members], compute)


@dataclass
class _Turn:
    block: SharedInput
    index: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = block_input(args, kwargs)
        y = None if x is None else self.block.output(self.index, x)
        return self.block.members[self.index].forward(*args, **kwargs) if y is None else y


@dataclass
class GatedMlp:
    """down(f(gate(x)) * up(x)) of a module that does nothing else.

    Attributes:
        members: gate, up and down.
        act: the module of f, which a hook may watch, or None. activation: f.
        forward: the module's own.
    """

    mlp: nn.Module
    members: tuple[Member, Member, Member]
    act: nn.Module | None
    activation: Activation
    forward: Forward
    told: ToldOnce = field(default_factory=ToldOnce, repr=False)

    def install(self) -> None:
        """Take the place of the module's forward."""
        object.__setattr__(self.mlp, "forward", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = block_input(args, kwargs)
        ys = None if x is None else self.outputs(x)
        if x is not None and ys is None and self.mlp.training:
            self.told(f"{self.members[0].path.rpartition('.')[0]} runs in parts", self._compute(x))
        return self.forward(*args, **kwargs) if ys is None else ys[0]

    def alone(self, x: Tensor) -> tuple[Tensor]:
        """By the module's own forward."""
        return (self.forward(x),)

    def outputs(self, x: Tensor) -> tuple[Tensor] | None:
        """By the block; None where it does not run."""
        compute = self._compute(x)
        if isinstance(compute, str):
            return None
        gate, up, down = (member.linear() for member in self.members)
        return (lora_mlp(x, (gate, up, down), self.activation, compute),)

    def _compute(self, x: Tensor) -> Compute | str:
        if watched(self.act) or any(watched(member.layer) for member in self.members):
            return "a hook watches"
        return _compute(x, self.members)


def _compute(x: Tensor, members: Sequence[Member]) -> Compute | str:
    """How a block computes, or in words why it does not."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    dropouts = {member.dropout for member in members}
    if len(dropouts) > 1:
        return "layers of one block drop different shares"
    for member in members:
        if why := member.why_not(dtype):
            return why
    return Compute(dtype, x.dtype if members[-1].follows_input else dtype, dropouts.pop())


def watched(module: object) -> bool:
    """Whether hooks wait for calls that a block does not make."""
    if not isinstance(module, nn.Module):
        return False
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
