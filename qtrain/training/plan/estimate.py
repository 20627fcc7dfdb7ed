"""What a config takes in memory, from its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from qtrain.config.schema import Config, OptimizerSection
from qtrain.distill.teacher import named_teacher
from qtrain.models.dtype import resolve_dtypes
from qtrain.training.live_bytes import tensor_bytes
from qtrain.training.optimizers import state_bytes, update_bytes
from qtrain.training.plan.one_layer import OneLayer
from qtrain.training.plan.shapes import held, prepared_shapes, skeleton
from qtrain.training.plan.sharded import Weights, shared_out
from qtrain.training.plan.step_memory import KindBytes, StepMemory

PAGED_FROM = 100_000
"""Elements from which bitsandbytes pages the state of a parameter."""


class Estimator:
    """Sizes of the model of one config, once; then memory by the shape of a micro-batch and the optimizer.

    Args:
        config: resolved.
        device: that will train.
        processes: that train together.

    Raises:
        ModelError: the shapes of the model are not to be told before it is loaded.
    """

    def __init__(self, config: Config, device: torch.device, processes: int = 1) -> None:
        self._config, self._on_gpu, self._processes = config, device.type == "cuda", processes
        storage, compute = resolve_dtypes(config.model.dtype, config.method.compute_dtype, device)
        shapes = prepared_shapes(config.model, config.method, storage, compute)
        self.trained = list(shapes.trained)
        self.base, self.trained_bytes = shapes.base_bytes, tensor_bytes(self.trained)
        self._whole = _weights(shapes.model)
        self._teacher = 0
        if config.distill.loss != "none" and not config.distill.cached:
            section = named_teacher(config.distill, config.model) if config.distill.teacher else config.model
            taught = config.method.model_copy(update={"base": "none", "packed": None})  # plain numbers
            self._teacher = tensor_bytes(held(skeleton(section, taught, compute)))
        context = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=compute == torch.bfloat16)
        self.one = OneLayer(shapes, device, context, config.model.fused)

    def step(self, batch: Mapping[str, Tensor], optimizer: OptimizerSection, *, accumulates: bool) -> StepMemory:
        """Of steps on micro-batches of the shape of ``batch``."""
        kinds = [
            KindBytes(
                kind.count,
                self.one.layer_bytes(kind, batch),
                tensor_bytes(p for p in kind.layer.parameters() if p.requires_grad),
            )
            for kind in self.one.kinds
        ]
        head = self.one.head_bytes(batch, self._config.distill)
        paged = optimizer.name.startswith("paged") and self._on_gpu
        state = state_bytes((p for p in self.trained if not paged or p.numel() < PAGED_FROM), optimizer)
        memory = StepMemory(
            base=self.base,
            trained=self.trained_bytes,
            gradients=self.trained_bytes,
            optimizer=state,
            update=update_bytes(self.trained, optimizer, on_gpu=self._on_gpu),
            inputs=2 * sum(tensor.nbytes for tensor in batch.values()),
            teacher=self._teacher,
            workspace=self.one.workspace,
            entry=head.entry,
            head=head.working,
            kinds=kinds,
            accumulates=accumulates,
            copies=self.trained_bytes if self._processes > 1 else 0,
            on_gpu=self._on_gpu,
        )
        if self._processes == 1 or self._config.trainer.get("strategy") != "fsdp2":
            return memory
        layers = [(kind.count, _weights(kind.layer)) for kind in self.one.kinds]
        return shared_out(memory, self._whole, layers, self._processes)

    def paged_bytes(self, optimizer: OptimizerSection) -> int:
        """Of optimizer state that lies where there is room, on the GPU or the host."""
        if not optimizer.name.startswith("paged") or not self._on_gpu:
            return 0
        return state_bytes((p for p in self.trained if p.numel() >= PAGED_FROM), optimizer)


def _weights(module: nn.Module) -> Weights:
    trained = tensor_bytes(p for p in module.parameters() if p.requires_grad)
    return Weights(frozen=tensor_bytes(module.parameters()) - trained, trained=trained)


def dense_base_bytes(config: Config, device: torch.device) -> int:
    """Of the base in place of a quantized one, as ``method.base=none`` stores it."""
    storage, _ = resolve_dtypes(config.model.dtype, config.method.compute_dtype, device)
    plain = config.method.model_copy(update={"base": "none"})
    return tensor_bytes(held(skeleton(config.model, plain, storage)))
