"""The level of recomputation that the free memory allows, from one layer that is run and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qtrain.config.schema import Config
from qtrain.distill import chunked_loss
from qtrain.distill.chunked_loss import product_dtype
from qtrain.distill.config import DistillSection
from qtrain.kernels.divergence import one_pass
from qtrain.modules.documents import known_rows, with_documents
from qtrain.modules.linear_cross_entropy import CHUNK_BYTES
from qtrain.modules.token_loss import INPUTS
from qtrain.training.live_bytes import meter, tensor_bytes
from qtrain.training.optimizers import state_bytes
from qtrain.training.recompute import Recompute, free_bytes, trained_bytes

MARGIN = 0.08
"""Share of the free memory that is left for fragments and for what other libraries take."""
GIB = 2**30


@dataclass(frozen=True)
class LayerBytes:
    """What one decoder layer takes at the shape of a micro-batch.

    Attributes:
        saved: by its forward, for its backward.
        input: of its input alone, which recomputation keeps.
        working: beyond ``saved`` while it runs backward.
        shared: by masks and position embeddings, once for all layers.
    """

    saved: int
    input: int
    working: int
    shared: int = 0


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step at each level.

    Attributes:
        layer: of each of ``layers``.
        head: of logits and loss; gone when the last layer's backward begins.
        fixed: at any time: gradients, optimizer state.
    """

    layer: LayerBytes
    layers: int
    head: int
    fixed: int

    def of(self, count: int) -> int:
        """With the first ``count`` layers recomputed: the highest of the whole step, between forward and backward.

        Everything is kept then, and the head or the last layer works; if that is recomputed, it is there once whole.
        """
        layer = self.layer
        kept = count * layer.input + (self.layers - count) * layer.saved
        last = layer.working + (layer.saved if count == self.layers else 0)
        return self.fixed + layer.shared + kept + max(self.head, last)

    @property
    def offloaded(self) -> int:
        """With all of them recomputed from the host: of three inputs one is used, one on its way in, one out."""
        layer = self.layer
        return self.fixed + layer.shared + 3 * layer.input + max(self.head, layer.saved + layer.working)

    def choose(self, free: int) -> tuple[str, int, str]:
        """(level, layers recomputed, why): the fewest that fit in ``free`` bytes."""
        room = int(free * (1 - MARGIN))
        known = f"{free / GIB:.1f} free"
        if self.of(0) <= room:
            return "none", 0, f"it takes {self.of(0) / GIB:.1f} GiB of {known}"
        whole = f"none would take {self.of(0) / GIB:.1f} GiB of {known}"
        for count in range(1, self.layers):
            if self.of(count) <= room:
                return "selective", count, whole
        if self.of(self.layers) <= room:
            return "full", self.layers, whole
        if self.offloaded <= room:
            return "offload", self.layers, f"full would take {self.of(self.layers) / GIB:.1f} GiB of {known}"
        return "offload", self.layers, f"even so it may not fit: {self.offloaded / GIB:.1f} GiB of {known}"


def settle(
    model: PreTrainedModel,
    config: Config,
    device: torch.device,
    loss_path: str,
    *,
    longest: Callable[[], int] | None = None,
    sharded: bool = False,
) -> Recompute:
    """The level that ``run.recompute`` names, in force; ``auto`` by what is free on ``device``.

    To be called in the context of the training's forward passes, the model in training mode.

    Args:
        longest: tokens of the longest row, asked for where a layer is measured; ``data.max_length`` if not given.
        sharded: weights will be shared out among processes, which changes what is free.
    """
    recompute = Recompute(model)
    asked = config.run.recompute
    if asked != "auto":
        recompute.set(asked, reason="run.recompute" if asked != "none" else "")
        return recompute
    free = free_bytes(device)
    recompute.set("none")
    if free is None or (why := _why_none(model, recompute, config, sharded)):
        recompute.reason = "the memory of a CPU is not counted" if free is None else str(why)
        return recompute
    try:
        length = config.data.max_length if longest is None else longest()
        level, count, reason = estimate(model, recompute, config, device, loss_path, length).choose(free)
    except torch.OutOfMemoryError:
        level, count, reason = "offload", len(recompute.layers), f"one layer alone exceeds {free / GIB:.1f} GiB free"
    except Exception as error:  # a model's own code, run in a way of ours: it must stop no run that nobody asked it of
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        level, count, reason = "none", 0, f"no layer could be measured ({what})"
    recompute.set(level, count, reason)
    return recompute


def _why_none(model: nn.Module, recompute: Recompute, config: Config, sharded: bool) -> str | None:
    """What there is to say where ``auto`` measures nothing, on a GPU."""
    if not recompute.layers:
        return "no layer that could run again"
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return "nothing trains"
    if config.run.cuda_graphs:
        return "a CUDA graph repeats what was saved"
    # The whole model lies on each GPU now, and a share of it when it trains.
    return "no share of weights is measured; run.recompute=full where it does not fit" if sharded else None


def estimate(
    model: PreTrainedModel,
    recompute: Recompute,
    config: Config,
    device: torch.device,
    loss_path: str,
    length: int | None = None,
) -> Estimate:
    """Of a step on micro-batches of ``data.batch_size`` rows of ``length`` tokens; ``data.max_length`` if not given."""
    rows, length = config.data.batch_size, length or config.data.max_length
    batch = probe_batch(rows, length, int(model.config.vocab_size), packing=config.data.packing, device=device)
    layer = layer_bytes(model, recompute.layers[len(recompute.layers) // 2], batch)
    state = state_bytes((p for p in model.parameters() if p.requires_grad), config.optimizer)
    whole = loss_path.startswith("whole")
    if config.distill.loss == "none":
        head = head_bytes(model, rows * length, whole=whole)
    else:
        head = taught_head_bytes(model, rows * length, config.distill, whole=whole)
    return Estimate(layer, len(recompute.layers), head, trained_bytes(model) + state)


def probe_batch(rows: int, length: int, vocab: int, *, packing: bool, device: torch.device) -> dict[str, Tensor]:
    """Inputs [rows, length] of the kind that training gives: two samples a row where rows are packed."""
    ids = (torch.arange(rows * length, device=device) % vocab).view(rows, length)
    if not packing:
        return {"input_ids": ids}
    positions = with_documents({"position_ids": (torch.arange(length) % -(-length // 2)).repeat(rows, 1)})
    return {"input_ids": ids, **{key: tensor.to(device) for key, tensor in positions.items()}}


def head_bytes(model: PreTrainedModel, tokens: int, *, whole: bool) -> int:
    """Of logits and their gradients: a chunk of them, or ``whole``; and of what goes into the head."""
    head = model.get_output_embeddings()
    vocab, width = (int(size) for size in head.weight.shape)
    size = 2 if torch.is_autocast_enabled(head.weight.device.type) else head.weight.element_size()
    logits = tokens * vocab * 4 if whole else min(tokens * vocab * 4, CHUNK_BYTES)
    # fp32 logits, the product they are cast from, and the gradient in that dtype; whole ones are not worked on in place
    logits += logits // 4 * 2 * size + (2 * logits if whole else 0)
    trains = vocab * width * 4 if head.weight.requires_grad else 0
    return logits + 3 * tokens * width * size + trains


def taught_head_bytes(model: PreTrainedModel, tokens: int, section: DistillSection, *, whole: bool) -> int:
    """The same where a teacher's logits stand beside."""
    head = model.get_output_embeddings()
    vocab, width = (int(size) for size in head.weight.shape)
    dtype = product_dtype(head.weight)
    size = dtype.itemsize
    if one_pass(head.weight.device, dtype) and not section.cached:
        logits = 2 * min(tokens * vocab * size, chunked_loss.CHUNK_BYTES)
    else:  # both products, and what ``qtrain.kernels.divergence`` makes of them in fp32
        numbers = min(tokens * vocab, chunked_loss.CHUNK_BYTES // 4)
        logits = numbers * (2 * size + 4 * (5 if section.loss == "jsd" else 3))
    if whole:
        logits += 5 * tokens * vocab * size  # both, the rows of them that count, and the gradient
    trains = vocab * width * (4 + size) if head.weight.requires_grad else 0
    return logits + 6 * tokens * width * size + trains


def layer_bytes(model: PreTrainedModel, layer: nn.Module, batch: Mapping[str, Tensor]) -> LayerBytes:
    """Run ``layer`` forward and backward on what ``batch`` brings it, and count; nothing of the model changes.

    A GPU runs it, so that its own kernels and libraries are counted too; on a CPU shapes alone go through a large one.
    """
    device = batch["input_ids"].device
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        (hidden, *args), kwargs = inputs_of(model, layer, batch)
        flops = 6 * batch["input_ids"].numel() * sum(p.numel() for p in layer.parameters())
        with meter(device, flops) as counter, torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            trained = [p for p in layer.parameters() if p.requires_grad]
            before = counter.now
            output = layer(hidden, *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            saved = counter.now - before
            torch.autograd.grad(output, [hidden, *trained], torch.ones_like(output), allow_unused=True)
            peak = counter.peak - before
    shared = tensor_bytes(_tensors((args, kwargs)))
    return LayerBytes(saved, hidden.nbytes, max(0, peak - saved), shared)


class _Reached(Exception):
    """The way out of the model's forward pass."""


def inputs_of(model: PreTrainedModel, layer: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """(positional, named) arguments that ``layer`` is given in a pass of the decoder."""
    found: list[tuple[Any, dict[str, Any]]] = []

    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    handle = layer.register_forward_pre_hook(take, with_kwargs=True)
    try:
        with torch.no_grad(), known_rows(model, batch):
            model.get_decoder()(**{key: batch[key] for key in INPUTS if key in batch}, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
