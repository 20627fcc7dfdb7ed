"""One decoder layer of each kind that a model has, in real memory: what a micro-batch leaves and takes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.distill.chunked_loss import product_dtype
from qtrain.distill.config import DistillSection
from qtrain.distill.divergence import Objective
from qtrain.distill.linear_divergence import linear_divergence, logits_divergence
from qtrain.distill.targets import Target, TeacherHead, TeacherLogits, TopK
from qtrain.models.fused import fuse_layers
from qtrain.modules.frozen_shapes import zeroed
from qtrain.modules.head import head_factors
from qtrain.modules.linear_cross_entropy import linear_cross_entropy
from qtrain.modules.quantizers import quantizers
from qtrain.modules.token_loss import INPUTS
from qtrain.training.live_bytes import meter, place, tensor_bytes
from qtrain.training.plan.shapes import Shapes, held
from qtrain.training.recompute import Recompute
from qtrain.training.recompute_budget import LayerBytes, layer_bytes

Context = Callable[[], AbstractContextManager[Any]]
PROBE_TOKENS = 8


@dataclass(frozen=True)
class Kind:
    """A layer that stands for others.

    Attributes:
        layer: the module.
        count: how many there are of it.
        type: what the config calls it (full_attention, ...), where it names them.
    """

    layer: nn.Module
    count: int
    type: str | None


@dataclass(frozen=True)
class HeadBytes:
    """Around the decoder's layers.

    Attributes:
        entry: kept by the embedding: the first layer's input, and a quantized table.
        working: beyond it from the last layer's output to the loss and back.
    """

    entry: int
    working: int


class OneLayer:
    """A model of one layer, prepared as the whole one is; its layer is changed for each kind in turn.

    Its weights are zeros: what memory a step takes does not depend on numbers. On a GPU a micro-batch really runs, with
    the kernels of the run. On a CPU, where it would take minutes, its operations run on shapes alone.

    Args:
        shapes: the model, which is taken apart.
        device: that will train.
        context: of forward passes, such as autocast.
        fused: ``model.fused``.

    Attributes:
        kinds: of layers.
        whole_logits: whether the head is more than a product, so that its logits are never cut into chunks.
        workspace: bytes that libraries and fused blocks keep on a GPU once they have run.
    """

    def __init__(self, shapes: Shapes, device: torch.device, context: Context, fused: str) -> None:
        self.plain, self._device, self._context = shapes.plain, device, context
        begun = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        layers = Recompute(shapes.plain).layers
        self._list = _list_of(shapes.plain, layers)
        self.kinds = _kinds(layers, getattr(shapes.plain.config, "layer_types", None))
        self._hold([kind.layer for kind in self.kinds], [kind.type for kind in self.kinds])
        _fill(shapes.model, device)
        for _, quantizer in quantizers(shapes.plain):
            quantizer.ready = True  # ranges that a calibration will find have their place
        fuse_layers(shapes.plain, device, fused, keeps_outputs=shapes.method.keeps_outputs)
        with context():
            shapes.method.fuse(shapes.model, context)
        self._after = self._modules_after()
        self.whole_logits = not self._head_is_a_product()
        self.workspace = 0
        if device.type == "cuda":
            self.workspace = torch.cuda.memory_allocated(device) - begun - tensor_bytes(held(shapes.model))

    def layer_bytes(self, kind: Kind, batch: Mapping[str, Tensor]) -> LayerBytes:
        """Of one layer of that kind."""
        self._hold([kind.layer], [kind.type])
        batch = {key: value.to(self._device) for key, value in batch.items() if key in INPUTS}
        with self._context():
            return layer_bytes(self.plain, kind.layer, batch)

    def head_bytes(self, batch: Mapping[str, Tensor], distill: DistillSection) -> HeadBytes:
        """Of embedding, last norm, output head and loss, that of ``distill`` where it has one."""
        ids, labels = batch["input_ids"].to(self._device), batch["labels"].to(self._device)
        chosen = int((labels[:, 1:] != -100).sum())
        flops = 6 * chosen * self.plain.get_output_embeddings().weight.numel()
        with meter(self._device, flops, chosen) as counter, self._context(), torch.enable_grad():
            before = counter.now
            hidden = self.plain.get_input_embeddings()(ids)
            entry = counter.now - before
        with meter(self._device, flops, chosen) as counter, self._context(), torch.enable_grad():
            trained = [p for p in self._outer_parameters() if p.requires_grad]
            hidden = hidden.detach().requires_grad_()
            if distill.loss == "none":
                before = counter.now
                loss = self._loss(self._through(hidden), labels)
            else:
                taught = self._taught(hidden)
                before = counter.now
                loss = self._divergence(self._through(hidden), labels[:, 1:], distill, taught)
            torch.autograd.grad(loss, [hidden, *trained], allow_unused=True)
            working = counter.peak - before
            del loss
        return HeadBytes(entry, working)

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if not self.whole_logits:
            x, weight, bias = head_factors(self.plain, hidden[:, :-1])
            return linear_cross_entropy(x, weight, labels[:, 1:], bias)
        logits = self.plain.get_output_embeddings()(hidden)[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")

    def _taught(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """What stands for the teacher's head: weight and bias of this one's shapes, which the teacher's bytes hold."""
        _, weight, bias = head_factors(self.plain, hidden[:, :-1])
        dtype = product_dtype(weight)
        return weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)

    def _divergence(
        self, hidden: Tensor, labels: Tensor, section: DistillSection, taught: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        objective = Objective.of(section)
        target: Target
        if section.cached:
            few = (*labels.shape, section.top_k)
            ids = torch.zeros(few, dtype=torch.int32, device=labels.device)
            target = TopK(ids, torch.zeros(few, dtype=torch.float16, device=labels.device))
        elif self.whole_logits:
            of_teacher = self.plain.get_output_embeddings()(hidden.detach())[:, :-1]
            target = TeacherLogits(of_teacher.detach())
        else:
            target = TeacherHead(hidden.detach()[:, :-1].clone(), *taught)
        if self.whole_logits:
            return logits_divergence(self.plain.get_output_embeddings()(hidden)[:, :-1], target, labels, objective)
        x, weight, bias = head_factors(self.plain, hidden[:, :-1])
        return linear_divergence(x, weight, target, labels, objective, bias)

    def _through(self, hidden: Tensor) -> Tensor:
        for module in self._after:
            hidden = module(hidden)
        return hidden

    def _outer_parameters(self) -> Iterator[nn.Parameter]:
        for module in (*self._after, self.plain.get_output_embeddings()):
            yield from module.parameters()

    def _hold(self, layers: Sequence[nn.Module], types: Sequence[str | None]) -> None:
        """Let the decoder have these layers alone."""
        self._list._modules.clear()
        self._list._modules.update({str(number): layer for number, layer in enumerate(layers)})
        config = self.plain.config
        config.num_hidden_layers = len(layers)
        if types[0] is not None:
            config.layer_types = list(types)

    def _modules_after(self) -> list[nn.Module]:
        """What the decoder calls after its layers: its last norm."""
        called: list[nn.Module] = []
        decoder = self.plain.get_decoder()
        children = [child for child in decoder.children() if child is not self._list]
        last = list(self._list.children())[-1]
        handles = [last.register_forward_hook(lambda *_: called.clear())]
        handles += [child.register_forward_hook(lambda module, *_: called.append(module)) for child in children]
        try:
            with torch.no_grad(), self._context():
                decoder(input_ids=self._probe(), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return called

    def _head_is_a_product(self) -> bool:
        """Whether the logits are what the head gives, and it is given what the decoder gives, untouched between."""
        seen: dict[str, Tensor] = {}  # kept alive, or another tensor might take the place of one

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                found = output if isinstance(output, Tensor) else output[0]
                seen[name] = found
                if inputs:
                    seen[f"into {name}"] = inputs[0]

            return hook

        decoder, head = self.plain.get_decoder(), self.plain.get_output_embeddings()
        handles = [decoder.register_forward_hook(note("decoder")), head.register_forward_hook(note("head"))]
        try:
            with torch.no_grad(), self._context():
                logits = self.plain(input_ids=self._probe(), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return place(seen["head"]) == place(logits) and place(seen["decoder"]) == place(seen["into head"])

    def _probe(self) -> Tensor:
        return torch.arange(1, PROBE_TOKENS + 1, device=self._device)[None]


def _list_of(model: nn.Module, layers: Sequence[nn.Module]) -> nn.ModuleList:
    wanted = set(layers)
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and wanted == set(m.children()))


def _kinds(layers: Sequence[nn.Module], types: Sequence[str] | None) -> list[Kind]:
    """Layers of the same modules, shapes and dtypes are of one kind."""
    found: dict[object, list[int]] = {}
    for number, layer in enumerate(layers):
        shapes = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        found.setdefault((str(layer), shapes, types[number] if types else None), []).append(number)
    return [Kind(layers[own[0]], len(own), types[own[0]] if types else None) for own in found.values()]


def _fill(model: nn.Module, device: torch.device) -> None:
    """Zeros on ``device`` in the place of what lies on the meta device, in place; on a CPU no page is touched by it."""
    filled: dict[int, Tensor] = {}

    def real(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        if id(tensor) not in filled:
            zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
            kind = isinstance(tensor, nn.Parameter)
            filled[id(tensor)] = nn.Parameter(zeros, requires_grad=tensor.requires_grad) if kind else zeros
        return filled[id(tensor)]

    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, Linear4bit) and isinstance(weight, Params4bit):
            zeroed(module, double_quant=weight.quant_state.nested, device=device)
        elif isinstance(module, Linear8bitLt):
            zeroed(module, double_quant=False, device=device)
        for parts in (module._parameters, module._buffers):
            for name, tensor in parts.items():
                if tensor is not None:
                    parts[name] = real(tensor)  # type: ignore[assignment]
