"""What every observer does: take batches, refuse what has no range, answer with one range a group."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from qtrain.errors import ConfigError, ModelError


class Observer(ABC):
    """Watches batches of a tensor and chooses the range that its quantizer will keep.

    Attributes:
        low, high: [groups] fp32, the smallest and the largest number seen; they live where the first batch lived.
        count: numbers seen in each group.
    """

    def __init__(self, *, bits: int, symmetric: bool, groups: int = 1, where: str | None = None) -> None:
        """Nothing seen yet.

        Args:
            bits: of a code, 2 .. 8.
            symmetric: the range will be [-high, high].
            groups: rows of a batch; each has a range of its own.
            where: the layer's name, for errors.

        Raises:
            ConfigError: bits or groups out of range.
        """
        if not 2 <= bits <= 8:
            raise ConfigError(f"bits={bits}", where=where, rule="observers choose ranges for codes of 2 to 8 bits")
        if groups < 1:
            raise ConfigError(f"groups={groups}", where=where, rule="an observer has at least one group")
        self.bits, self.symmetric, self.groups, self.where = bits, symmetric, groups, where
        self.low = torch.full((groups,), torch.inf)
        self.high = torch.full((groups,), -torch.inf)
        self.count = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take one batch; an empty one changes nothing.

        Args:
            x: [groups, n], any float dtype, any strides; taken as fp32.

        Raises:
            ModelError: another shape or dtype, NaN or inf. Nothing of such a batch is taken.
        """
        if x.ndim != 2 or x.shape[0] != self.groups or not x.is_floating_point():
            raise ModelError(
                f"values of shape {list(x.shape)} and dtype {x.dtype}",
                where=self.where,
                rule=f"an observer of {self.groups} groups takes floats [{self.groups}, n]",
            )
        if x.shape[1] == 0:
            return
        if self.count == 0:
            self._to(x.device)
        values = x.to(self.low.device, torch.float32)
        low, high = torch.aminmax(values, dim=1)
        finite = torch.isfinite(low) & torch.isfinite(high)
        if not bool(finite.all()):
            raise ModelError(
                f"{int((~finite).sum())} of {self.groups} groups hold NaN or inf "
                f"(the first is group {int((~finite).nonzero()[0, 0])})",
                where=self.where,
                rule="values to choose a range for are finite in fp32",
            )
        self._take(values, low, high)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.count += values.shape[1]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The range that was chosen: (low [groups], high [groups]) fp32, low <= 0 <= high.

        Zero is inside, for an affine code must hold it exactly. Symmetric: low = -high.

        Raises:
            ModelError: no number was seen.
        """
        if self.count == 0:
            raise ModelError(
                "no value was observed",
                where=self.where,
                rule="a static range is chosen from at least one value",
                fix="run a batch through this layer before its range is asked for",
            )
        low, high = self._range()
        if self.symmetric:
            reach = torch.maximum(low.abs(), high.abs())
            return -reach, reach
        return low.clamp(max=0.0), high.clamp(min=0.0)

    @abstractmethod
    def _take(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        """Take fp32 values [groups, n > 0] whose smallest and largest are low and high, [groups]."""

    @abstractmethod
    def _range(self) -> tuple[Tensor, Tensor]:
        """(low, high) [groups] from what was taken; where symmetric, the larger magnitude counts."""

    def _to(self, device: torch.device) -> None:
        """Move the state to the device of the first batch."""
        self.low, self.high = self.low.to(device), self.high.to(device)
