"""Bytes of a training step, part by part, at the moment when there are most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qtrain.training.recompute import LEVELS
from qtrain.training.recompute_budget import LayerBytes

HEAD, LAYER, UPDATE = "head and loss", "one layer's backward", "the optimizer's step"


@dataclass(frozen=True)
class KindBytes:
    """Layers of one kind: how many, what a micro-batch takes in each, and bytes of the gradients of each."""

    count: int
    layer: LayerBytes
    gradients: int


@dataclass(frozen=True)
class Peak:
    """The highest moment of a step.

    Attributes:
        total: bytes.
        activations: that the decoder keeps by then.
        gradients: that exist by then.
        working: of what happens at that moment.
        moment: what that is, in words.
    """

    total: int
    activations: int
    gradients: int
    working: int
    moment: str


@dataclass(frozen=True)
class StepMemory:
    """What the parts of a step take, in bytes. A step is any but the first, when there is no optimizer state yet.

    Attributes:
        base: weights that do not train, as they are stored.
        trained: adapters, scales or whole weights.
        gradients: of those.
        optimizer: its state.
        update: what its step takes for itself.
        inputs: token ids and labels, of this micro-batch and the next.
        teacher: of distillation, beside the student.
        workspace: of libraries and kernels, kept from step to step.
        entry: the first layer's input, and what embedding it keeps.
        head: from the last layer's output to the loss and back.
        kinds: the decoder's layers.
        accumulates: a step has several micro-batches, so that gradients are there while one runs backward.
        copies: gradients that the exchange between processes holds a second time.
        on_gpu: offloaded inputs leave the memory that is counted.
    """

    base: int
    trained: int
    gradients: int
    optimizer: int
    update: int
    inputs: int
    teacher: int
    workspace: int
    entry: int
    head: int
    kinds: Sequence[KindBytes]
    accumulates: bool
    copies: int = 0
    on_gpu: bool = False

    @property
    def layers(self) -> int:
        """Of the decoder."""
        return sum(kind.count for kind in self.kinds)

    @property
    def held(self) -> int:
        """There at any time."""
        always = self.base + self.trained + self.optimizer + self.inputs + self.teacher + self.workspace
        return always + self.copies

    def at(self, level: str, count: int | None = None) -> Peak:
        """With recomputation at that level, ``count`` layers of ``selective`` (default: half).

        Moments: the head, when all activations are kept; the last layer's backward; the first layer's, when the
        gradients of all others are there; the optimizer's step, after which they are let go.
        """
        total = self.layers
        count = {"none": 0, "selective": (total + 1) // 2 if count is None else count}.get(level, total)
        kept = self.kept(level, count)
        shared = max((kind.layer.shared for kind in self.kinds), default=0)
        activations = self.entry + shared + kept
        before = self.gradients if self.accumulates else 0
        largest = max((kind.layer.working for kind in self.kinds), default=0)
        saved = max((kind.layer.saved for kind in self.kinds), default=0)
        again = saved if count == total else 0  # it runs again first
        own = max((kind.gradients for kind in self.kinds), default=0)  # ``working`` has them too
        others = self.gradients if self.accumulates else max(0, self.gradients - own)
        one = self.entry + shared + (0 if count else saved)
        moments = [
            (activations, before, self.head, HEAD),
            (activations, before, again + largest, LAYER),
            (one, others, (saved if count else 0) + largest, LAYER),
            (0, self.gradients, self.update, UPDATE),
        ]
        best = max(moments, key=lambda moment: sum(moment[:3]))
        return Peak(self.held + sum(best[:3]), *best)

    def kept(self, level: str, count: int) -> int:
        """Activations of all layers, the first ``count`` of which keep their input alone."""
        if level == "offload" and self.on_gpu:
            return 3 * max(kind.layer.input for kind in self.kinds)  # one in use, one on its way in, one out
        share = count / self.layers if self.layers else 0.0
        return int(sum(kind.count * (share * kind.layer.input + (1 - share) * kind.layer.saved) for kind in self.kinds))

    def fewest(self, room: int) -> tuple[str, int] | None:
        """The level that recomputes the fewest layers within ``room`` bytes; None where none fits."""
        for count in range(self.layers + 1):
            level = "none" if not count else "full" if count == self.layers else "selective"
            if self.at(level, count).total <= room:
                return level, count
        return ("offload", self.layers) if self.at("offload").total <= room else None

    def levels(self) -> dict[str, int]:
        """Bytes at each level."""
        return {level: self.at(level).total for level in LEVELS}
