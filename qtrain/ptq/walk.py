"""A decoder is quantized block by block, each on what the quantized blocks before it give."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.errors import DataError, ModelError
from qtrain.modules.host_memory import give_back
from qtrain.modules.record import LinearRecord
from qtrain.modules.unread_linear import read_weight
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.activation_stats import inference
from qtrain.ptq.balance import Balancing
from qtrain.ptq.block_text import BlockText, Context, DecoderText, Progress
from qtrain.ptq.inputs import Passes, gather_inputs, shared_inputs, unseen_inputs
from qtrain.ptq.start import Inputs, Start
from qtrain.registry import did_you_mean

Place = Callable[[str, nn.Linear, LinearRecord], None]


@dataclass(frozen=True)
class LayerLoss:
    """What one layer lost when it was quantized.

    Attributes:
        error: tr(D H D^T) / tr(W H W^T), D = W_q - W: the expected squared error of the output over its power; with
            the identity in H's place where no Hessian was known.
        of: which of the two.
        seen: whether any token of the text reached the layer; an expert's input that none reached was taken as
            uncorrelated features of size 1.
    """

    name: str
    error: float
    of: Literal["output", "weight"]
    seen: bool = True


def quantize_blocks(
    model: PreTrainedModel,
    specs: Mapping[str, QuantSpec],
    start: Start[Any],
    rows: Sequence[Tensor],
    *,
    place: Place,
    context: Context = nullcontext,
    sequential: bool = True,
    progress: Progress | None = None,
) -> list[LayerLoss]:
    """Quantize the linears named in ``specs``: statistics of their inputs, ``start``, ``place``; block after block.

    Held at a time: the hidden states that enter one block, on the CPU, and the statistics of one group of layers that
    share an input (with ``sequential=False`` of one block). A start that asks for no statistics runs no text. Layers
    outside of the blocks, such as an output head, come last, on what the quantized decoder gives.

    Args:
        model: any transformers decoder; it is changed by ``place`` alone, and by the start where it balances.
        rows: token ids [b, L] each, without padding; lengths may differ.
        place: puts a quantized layer into the model, as new weights or as another module of that name.
        context: what forward passes run in, such as an autocast.
        sequential: each group of layers sees the outputs of the quantized layers before it in its block (GPTQ's
            true-sequential), not only those of the blocks before it.
        progress: wraps the loop over blocks.

    Raises:
        ModelError: a name that the model does not have or that is no linear layer; blocks that are no chain.
        DataError: no rows, inputs that are not finite, a layer outside of the blocks that no token reaches.
    """
    _check(model, specs)
    walk = _Walk(model, specs, start, place)
    over: Progress = progress or (lambda items, total: items)
    with inference(model):
        if start.statistic == "none" and not isinstance(start, Balancing):
            return [walk.alone(name) for name in over(iter(specs), len(specs))]
        text = DecoderText.of(model, _checked(rows, start), context, over)
        names = [[name for name in specs if name.startswith(f"{text.prefix}.{k}.")] for k in range(len(text.blocks))]
        losses: list[LayerLoss] = []
        # Blocks after the last one with a layer of ``specs`` need not run.
        last = max((k for k, own in enumerate(names) if own), default=-1)
        for k in over(iter(range(last + 1)), last + 1):
            block = text.at(k, names[k])
            losses += walk.block(block, sequential)
            if k < last:
                text.leave(block)
        return losses + walk.rest([name for name in specs if not any(name in own for own in names)], rows, context)


@dataclass(frozen=True)
class _Walk:
    model: PreTrainedModel
    specs: Mapping[str, QuantSpec]
    start: Start[Any]
    place: Place

    def block(self, block: BlockText, sequential: bool) -> list[LayerLoss]:
        """Balance one block, then quantize its layers."""
        if not block.layers:
            return []
        groups, statistic = block.groups(), self.start.statistic
        if isinstance(self.start, Balancing):
            self.start.balance(block, self.specs)
        losses = []
        for stage in _stages(groups) if sequential else [groups]:
            inputs = block.inputs(stage, statistic)
            losses += [self.quantize(name, inputs[name]) for group in stage for name in group]
        reached = {loss.name for loss in losses}
        for name, linear in block.linears([name for name in block.layers if name not in reached]).items():
            unseen = unseen_inputs(linear.in_features, statistic, linear.weight.device)
            losses.append(replace(self.quantize(name, unseen), seen=False))
        return losses

    def rest(self, names: Sequence[str], rows: Sequence[Tensor], context: Context) -> list[LayerLoss]:
        """Quantize layers outside of the blocks, on one more pass over the model."""
        if not names:
            return []
        layers = {name: self.model.get_submodule(name) for name in names}
        groups = shared_inputs(layers, _passes(self.model, layers, rows, context))
        missed = set(names).difference(*groups)
        if missed:
            raise DataError(
                f"no calibration token reached {min(missed)!r}",
                rule="text flows through the decoder and its head alone",
                fix=f"leave it as it is: method.skip=[{min(missed)}]",
            )
        inputs = gather_inputs(groups, layers, _passes(self.model, layers, rows, context), self.start.statistic)
        return [self.quantize(name, inputs[name]) for name in names]

    def alone(self, name: str) -> LayerLoss:
        """Quantize and place one layer by its weight, of which nothing stays in memory."""
        loss = self.quantize(name, Inputs())
        give_back()
        return loss

    def quantize(self, name: str, inputs: Inputs) -> LayerLoss:
        """Quantize and place one layer."""
        linear = self.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight = read_weight(linear)
        try:
            record = self.start.quantize(weight, self.specs[name], inputs)
        except ModelError as error:
            raise ModelError(error.what, where=error.where or name, rule=error.rule, fix=error.fix) from error
        loss = LayerLoss(
            name, _relative_error(weight, record, inputs), "weight" if inputs.hessian is None else "output"
        )
        self.place(name, linear, record)
        self.model.get_submodule(name).eval()
        return loss


def _check(model: nn.Module, specs: Mapping[str, QuantSpec]) -> None:
    modules = dict(model.named_modules())
    for name in specs:
        if name not in modules:
            raise ModelError(f"there is no module {name!r} to quantize", fix=did_you_mean(name, modules))
        if not isinstance(modules[name], nn.Linear):
            raise ModelError(f"{name!r} is a {type(modules[name]).__name__}", rule="linear layers are quantized")


def _checked(rows: Sequence[Tensor], start: Start[Any]) -> list[Tensor]:
    for row in rows:
        if row.ndim != 2 or row.is_floating_point():
            raise DataError(f"a row of shape {list(row.shape)}, {row.dtype}", rule="token ids [batch, tokens]")
    found = [row for row in rows if row.numel()]
    if not found:
        raise DataError("no rows to calibrate on", rule=f"{type(start).__name__} looks at what flows into the layers")
    return found


def _stages(groups: Sequence[list[str]]) -> list[list[list[str]]]:
    """Groups to quantize before the block runs again, in order of their calls.

    One group each, but experts side by side, whose names differ in an index: a block of 64 would run 128 times.
    """
    stages: dict[tuple[str, ...], list[list[str]]] = {}
    for group in groups:
        stages.setdefault(tuple(re.sub(r"\.\d+(?=\.|$)", ".#", name) for name in group), []).append(group)
    return list(stages.values())


def _passes(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], rows: Sequence[Tensor], context: Context
) -> Passes:
    """The decoder on each sequence of text; with its head, whose logits are large, only where that is asked for."""
    decoder = model.get_decoder()
    inside = set(decoder.modules())
    run = decoder if all(layer in inside for layer in layers.values()) else model
    device = next(model.parameters()).device
    for row in rows:
        for ids in row.split(1):
            with context(), torch.no_grad():
                run(input_ids=ids.to(device), use_cache=False)
            yield


def _relative_error(weight: Tensor, record: LinearRecord, inputs: Inputs) -> float:
    weight = weight.to(record.codes.device)
    error = _power(record.dequantize().sub_(weight), inputs.hessian)
    power = _power(weight.float(), inputs.hessian)
    return error / power if power else 0.0


def _power(rows: Tensor, hessian: Tensor | None) -> float:
    """tr(A H A^T) of A [out, in], H the identity where it is not known."""
    return float(torch.dot((rows if hessian is None else rows @ hessian).flatten(), rows.flatten()))
