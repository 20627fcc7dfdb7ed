"""A linear layer whose weight lies in a file until the layer is quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


class UnreadLinear(nn.Linear):
    """The widths and the bias of ``linear``; its weight [out, in] is on the meta device, and read when it is asked for.

    Args:
        load: reads the weight anew at each call: nothing here keeps it.
        place: the file and its first byte there.
    """

    def __init__(self, linear: nn.Linear, load: Callable[[], Tensor], place: tuple[str, int]) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=linear.weight.dtype
        )
        if linear.bias is not None:
            self.bias = linear.bias
        self.load, self.place = load, place


def read_weight(linear: nn.Linear) -> Tensor:
    """The weight [out, in], from its file where it lies in one."""
    return linear.load() if isinstance(linear, UnreadLinear) else linear.weight.detach()


def in_file_order(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The same layers, those that lie in files as they follow each other there; of others the order stays."""
    return dict(
        sorted(layers.items(), key=lambda item: item[1].place if isinstance(item[1], UnreadLinear) else ("", 0))
    )
