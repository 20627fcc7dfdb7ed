"""What a block computed for all of its layers at once, until each has been asked for its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

from torch import Tensor

_ALL: WeakSet[SharedOutputs] = WeakSet()


@dataclass(eq=False)
class SharedOutputs:
    """Outputs of layers that are given the same tensor: computed when the first is called, gone with the last."""

    _input: Tensor | None = field(default=None, repr=False)
    _version: int = 0
    _outputs: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _ALL.add(self)

    def take(self, index: int, x: Tensor, compute: Callable[[Tensor], Sequence[Tensor] | None]) -> Tensor | None:
        """That of one of the layers for this content of ``x``; None where ``compute`` gives none."""
        if self._input is not x or self._version != x._version or index not in self._outputs:
            ys = compute(x)
            if ys is None:
                return None
            self._input, self._version, self._outputs = x, x._version, dict(enumerate(ys))
        y = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return y

    def clear(self) -> None:
        """Hold nothing."""
        self._input, self._outputs = None, {}


def forget_outputs() -> None:
    """Of all blocks: a pass that failed asks for no more, and what is left holds its graph."""
    for shared in _ALL:
        shared.clear()
