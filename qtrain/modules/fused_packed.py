"""Gated MLPs over packed integers whose scales train, without the largest of the tensors that their layers keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.kernels.packed_gated import packed_gated_linear
from qtrain.modules.block_call import block_input
from qtrain.modules.block_parts import Context, exchanged, gated_names, why_not_equal
from qtrain.modules.eval_mode import eval_mode
from qtrain.modules.fused_layers import watched
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.shared_inputs import PROBE_TOKENS, by_parent, inputs_of


def fuse_packed(model: PreTrainedModel, context: Context) -> str:
    """Let gated MLPs make what down multiplies again in the backward, in place: 172 MB a layer of a 7B at 4 x 2048.

    Args:
        context: what training runs in, such as its autocast.

    Returns:
        How many do, and what does not and why, in words.
    """
    alone: Counter[str] = Counter()
    count = 0
    with eval_mode(model):
        try:
            inputs = inputs_of(model, PackedLinear, context)
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            return f"layer by layer: no forward pass of {PROBE_TOKENS} tokens ({' '.join(str(error).split())[:80]})"
        for parent, groups in by_parent(model, PackedLinear, inputs, alone).items():
            members = [list(group.items()) for group in groups]
            names = gated_names(parent, members, PackedLinear)
            if names is None:
                continue
            layers = [layer for name in names if isinstance(layer := parent._modules[name], PackedLinear)]
            mlp = GatedPacked(parent, names, layers, parent.forward)
            trained = [tensor for layer in layers for tensor in (layer.scale, layer.zero) if tensor is not None]
            like = next(x for group in members for name, x in group if name == names[0])
            why = why_not_equal(mlp.alone, mlp.outputs, trained, like, context)
            if why is None:
                object.__setattr__(parent, "forward", mlp)
                count += 1
            else:
                alone[why] += 1
    words = f"{count} MLPs that keep no input of their last layer"
    return words + "".join(f"; {number} as they are: {why}" for why, number in alone.items())


@dataclass
class GatedPacked:
    """down(silu(gate(x)) * up(x)) of a module that does nothing else.

    Attributes:
        names, layers: gate, up and down.
        forward: the module's own.
    """

    mlp: nn.Module
    names: list[str]
    layers: list[PackedLinear]
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = block_input(args, kwargs)
        ys = None if x is None else self.outputs(x)
        return self.forward(*args, **kwargs) if ys is None else ys[0]

    def alone(self, x: Tensor) -> tuple[Tensor, ...]:
        """By the module's own forward."""
        return (self.forward(x),)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """By the block; None where it does not run."""
        gate, up, down = self.layers
        acts = (child for child in self.mlp.children() if not isinstance(child, PackedLinear))
        if exchanged(self.mlp, self.names, self.layers, PackedLinear) or watched(down) or any(map(watched, acts)):
            return None
        if down.input_quantizer is not None:
            return None
        opened, wide = gate(x), up(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else opened.dtype
        if opened.dtype != dtype or wide.dtype != dtype:
            return None
        return (packed_gated_linear(opened, wide, *down.product_arguments()),)
