"""Memory of a process that holds a share of the weights (``trainer.strategy=fsdp2``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qtrain.training.plan.step_memory import StepMemory

GATHERED_LAYERS = 2
"""The one that runs, and the next on its way."""


@dataclass(frozen=True)
class Weights:
    """Bytes of parameters, of a layer or of the whole model.

    Attributes:
        frozen: that do not train, as they are stored; scales of NF4 are no parameters, and lie in every process whole.
        trained: that do.
    """

    frozen: int
    trained: int


def shared_out(memory: StepMemory, whole: Weights, layers: Sequence[tuple[int, Weights]], processes: int) -> StepMemory:
    """``memory`` of one process of several, each with 1 / processes of weights, gradients and optimizer state.

    Whole beside the shares are two decoder layers, what is around all layers (embedding, norm, head: torch keeps them
    from the forward through the backward), and the gradients of those before they are exchanged.

    Args:
        whole: of the model.
        layers: how many of each kind, and the weights of one.
    """
    outside = Weights(
        whole.frozen - sum(count * layer.frozen for count, layer in layers),
        whole.trained - sum(count * layer.trained for count, layer in layers),
    )
    frozen = max((layer.frozen for _, layer in layers), default=0)
    trained = max((layer.trained for _, layer in layers), default=0)
    kinds = [replace(kind, gradients=kind.gradients // processes) for kind in memory.kinds]
    return replace(
        memory,
        base=memory.base - whole.frozen + whole.frozen // processes + outside.frozen + GATHERED_LAYERS * frozen,
        trained=whole.trained // processes + outside.trained + GATHERED_LAYERS * trained,
        gradients=memory.gradients // processes,
        optimizer=memory.optimizer // processes,
        update=memory.update // processes,
        copies=outside.trained + trained,
        kinds=kinds,
    )
