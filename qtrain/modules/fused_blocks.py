"""Which LoRA linears of a decoder run as one block: seen by watching it, taken where a block proves equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import permutations
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qtrain.kernels.fp8_product import fp8_units_take, fp8_words, has_fp8
from qtrain.kernels.gated import Activation, gated_path
from qtrain.kernels.nf4_dequantize import Dequantize, choose_dequantize, nf4_dequantize
from qtrain.modules.block_proof import BlockProof
from qtrain.modules.eval_mode import eval_mode
from qtrain.modules.fp8_weight import in_fp8
from qtrain.modules.frozen_linear import frozen_kind
from qtrain.modules.frozen_weight import FourBit, Workspace, frozen_weight
from qtrain.modules.fused_layers import GatedMlp, Member, SharedInput
from qtrain.modules.shared_inputs import PROBE_TOKENS, by_parent, inputs_of
from qtrain.modules.told_once import ToldOnce


def fuse_blocks(
    model: PreTrainedModel, context: Callable[[], AbstractContextManager[Any]], asked: str, *, fp8: bool = False
) -> str:
    """Let LoRA linears that share an input, and gated MLPs, run as one autograd function each in training, in place.

    What shares an input is seen in a forward pass of 8 tokens; each kind of block is then compared with PEFT's layers.
    Dropout masks are drawn again in the backward, one for all layers of an input: a Llama layer of the 7B shape takes
    0.83 of PEFT's time with dropout, 0.81 without, and keeps 0.56 and 0.65 of the bytes (an H200, NF4).

    Args:
        context: what training runs in, such as its autocast.
        asked: ``auto`` or ``none``.
        fp8: frozen weights, their inputs and output gradients are rounded to e4m3 rows and multiplied so.

    Returns:
        What runs fused over which base, and what does not and why, in words.
    """
    if asked == "none":
        return "as PEFT has them (method.fused_blocks=none)"
    device = next(model.parameters()).device
    dequantize, by = choose_dequantize(device)
    with eval_mode(model):
        try:
            inputs = inputs_of(model, LoraLayer, context)
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            return f"as PEFT has them: no forward pass of {PROBE_TOKENS} tokens ({' '.join(str(error).split())[:80]})"
        fused = _Fused(BlockProof(context), dequantize, {module: name for name, module in model.named_modules()})
        for parent, groups in by_parent(model, LoraLayer, inputs, fused.refused).items():
            fused.take(parent, groups)
    words = fused.words(device, by)
    return words + (f"; {fused.in_fp8(device)}" if fp8 else "")


class _Fused:
    """What was fused so far, and what not."""

    def __init__(self, proof: BlockProof, dequantize: Dequantize, paths: Mapping[nn.Module, str]) -> None:
        self.refused: Counter[str] = Counter()
        self._proof, self._dequantize, self._workspace = proof, dequantize, Workspace()
        self._blocks: Counter[str] = Counter()
        self._bases: Counter[str] = Counter()
        self._notes: dict[str, None] = {}
        self._groups: list[list[Member]] = []
        self._paths, self._told = paths, ToldOnce()

    def take(self, parent: nn.Module, groups: Sequence[Mapping[str, Tensor]]) -> None:
        """Blocks in place of the layers of one module, each group by name with the tensor that all of it is given."""
        blocks: list[tuple[SharedInput, Tensor]] = []
        for group in groups:
            members = [member for name in group if (member := self._member(parent, name)) is not None]
            if not members:
                continue
            block, x = SharedInput(members, self._told), next(iter(group.values()))
            why = self._proof.why_not(tuple(map(_kind, members)), block.alone, block.outputs, members, x)
            if why is None:
                blocks.append((block, x))
            else:
                self.refused[why] += len(members)
        mlp = self._mlp(parent, blocks)
        for block, _ in blocks:
            block.install()
            self._groups.append(block.members)
            self._bases.update(_base_kind(member) for member in block.members)
            if note := self._adapters(block.members):
                self._notes[note] = None
            if len(block.members) > 1 and any(isinstance(member.dropout_layer, nn.Dropout) for member in block.members):
                self._notes["one dropout mask for layers that share an input"] = None
        if mlp is not None:
            mlp.install()
            self._blocks["MLP"] += 1
            if mlp.activation is F.silu:
                self._notes[f"SwiGLU {gated_path(mlp.members[0].device)}"] = None
        else:
            self._blocks.update(_label(block) for block, _ in blocks)

    def in_fp8(self, device: torch.device) -> str:
        """Let all frozen weights be multiplied in fp8, now that the blocks have proven equal without; in words."""
        refused: Counter[str] = Counter()
        odd: Counter[str] = Counter()
        for members in self._groups:
            for member in members:
                frozen = in_fp8(member.frozen)
                if isinstance(frozen, str):
                    refused[frozen] += 1
                else:
                    member.frozen = frozen
                    if has_fp8(device) and not fp8_units_take(*_widths(member)):
                        odd["{} x {}".format(*_widths(member))] += 1
        count = sum(map(len, self._groups)) - refused.total() - odd.total()
        line = f"{count} frozen weights as e4m3 rows on {fp8_words(device)}" if count else "no frozen weight in fp8"
        if odd:
            line += f"; {odd.total()} as the same numbers in fp32: {', '.join(odd)} are no multiples of 16"
        return line + "".join(f"; not {number} layers of {why}" for why, number in refused.items())

    def words(self, device: torch.device, by: str) -> str:
        """One line."""
        refused = ", ".join(f"{count} layers for {why}" for why, count in self.refused.items())
        if not self._blocks:
            return f"as PEFT has them: {refused or 'no LoRA linears'}"
        counts = set(self._blocks.values())
        names = [name if len(counts) == 1 else f"{count} {name}" for name, count in self._blocks.items()]
        what = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        line = f"{what} fused over {' and '.join(self._bases)}"
        line += f" ({counts.pop()} layers)" if len(counts) == 1 else ""
        if {"nf4", "fp4"} & self._bases.keys():
            line += f", dequantized by {by}"
        return ", ".join((line, *self._notes)) + (f"; as PEFT has them: {refused}" if refused else "")

    def _member(self, parent: nn.Module, name: str) -> Member | None:
        layer = parent._modules[name]
        assert isinstance(layer, nn.Module) and isinstance(layer, LoraLayer)
        base = layer.get_base_layer()
        assert isinstance(base, nn.Module)
        frozen = _why_not(layer) or frozen_weight(base, self._workspace, self._dequantize)
        if isinstance(frozen, str):
            self.refused[frozen] += 1
            return None
        return Member(name, self._paths[layer], parent, layer, layer.active_adapters[0], frozen, layer.forward)

    def _adapters(self, members: Sequence[Member]) -> str | None:
        """How those of a shared input are added, where a kernel could write them beside 4-bit weights; else None."""
        four_bit = all(isinstance(member.frozen, FourBit) for member in members)
        if self._dequantize is not nf4_dequantize or not four_bit or len(members) < 2:
            return None
        ranks = [len(member.linear().a) for member in members]
        if any(rank % 8 for rank in ranks):
            return f"adapters of rank {max(ranks)} by themselves: in the base's products are those of multiples of 8"
        return "adapters of shared inputs in the base's products"

    def _mlp(self, parent: nn.Module, blocks: Sequence[tuple[SharedInput, Tensor]]) -> GatedMlp | None:
        """The module as a gated MLP: two linears of one input, one of another, a function, and equal results."""
        by_size = sorted(blocks, key=lambda one: -len(one[0].members))
        rest = [child for child in parent.children() if not isinstance(child, LoraLayer)]
        if [len(block.members) for block, _ in by_size] != [2, 1] or len(rest) > 1:
            return None
        act = rest[0] if rest else None  # liger-kernel's MLP has no module for it
        if act is not None and next(act.parameters(), None) is not None:
            return None
        (pair, x), (last, _) = by_size
        refused: list[str] = []
        for gate, up in permutations(pair.members):
            members = (gate, up, last.members[0])
            mlp = GatedMlp(parent, members, act, _activation(act), parent.forward, self._told)
            kind = (type(parent), type(act), gate.name, tuple(map(_kind, members)))
            why = self._proof.why_not(kind, mlp.alone, mlp.outputs, members, x)
            if why is None:
                return mlp
            refused.append(why)
        self._notes[f"MLP in parts for {refused[0]}"] = None  # of the order in which they are called
        return None


def _why_not(layer: LoraLayer) -> str | None:
    """What a block does not know of an adapter."""
    if len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.lora_A:
        return "several adapters, or one that is no pair of factors"
    (adapter,) = layer.active_adapters
    if adapter in layer.lora_variant:
        return "DoRA" if layer.use_dora.get(adapter) else f"{type(layer.lora_variant[adapter]).__name__}"
    if layer.lora_bias.get(adapter) or getattr(layer, "fan_in_fan_out", False):
        return "a bias in the adapter, or a transposed weight"
    factors = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if not all(isinstance(factor, Tensor) and factor.requires_grad for factor in factors):
        return "an adapter that does not train"
    return None


def _widths(member: Member) -> tuple[int, int]:
    linear = member.linear()
    return linear.a.shape[1], linear.b.shape[0]


def _kind(member: Member) -> object:
    layer, base = member.layer, member.layer.get_base_layer()
    widths = base.in_features, base.out_features, layer.r[member.adapter]
    biased = getattr(base, "bias", None) is not None
    return type(layer), type(base), _base_kind(member), widths, biased, layer.scaling[member.adapter]


def _base_kind(member: Member) -> str:
    base = member.layer.get_base_layer()
    assert isinstance(base, nn.Module)
    return frozen_kind(base) or "16 bits"


def _activation(act: nn.Module | None) -> Activation:
    """F.silu where that is what ``act`` computes, for which there is a kernel, or there is none; else ``act``."""
    if act is None:
        return F.silu
    x = torch.linspace(-30, 30, 241, device="cpu")
    with torch.no_grad():
        return F.silu if torch.equal(act(x), F.silu(x)) else act


def _label(block: SharedInput) -> str:
    names = [member.name.removesuffix("_proj") for member in block.members]
    return "".join(names).upper() if all(len(name) == 1 for name in names) else "+".join(names)
