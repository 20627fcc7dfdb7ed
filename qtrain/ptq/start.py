"""What chooses the integers that training begins with, and that post-training quantization ends with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

from torch import Tensor

from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import StartSection

Statistic = Literal["none", "moments", "hessian"]
Options = TypeVar("Options", bound=StartSection)


@dataclass(frozen=True)
class Inputs:
    """What was seen of a layer's input x [tokens, in] on calibration text.

    Attributes:
        moment: E[x_j^2] [in], fp32; None where the start asked for nothing.
        largest: max|x_j| [in].
        magnitude: E|x_j| [in].
        hessian: E[x x^T] [in, in], for starts that ask for it.
    """

    moment: Tensor | None = None
    largest: Tensor | None = None
    magnitude: Tensor | None = None
    hessian: Tensor | None = None


class Start(ABC, Generic[Options]):
    """A starting point: one layer's weight in, its record out. Some balance each block first: ``balance.Balancing``.

    Args:
        options: its section of the config.
    """

    statistic: ClassVar[Statistic] = "none"
    """What ``quantize`` wants to know of the layer's input: nothing, the vectors of Inputs, or its Hessian as well."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @abstractmethod
    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        """Codes, scales and zero points of one weight [out, in]."""
