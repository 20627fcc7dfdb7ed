"""The range of each group with the least squared error."""

from __future__ import annotations

from torch import Tensor

from qtrain.modules.record import LinearRecord
from qtrain.numerics.ranges import search_qparams
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import MseSection
from qtrain.ptq.rtn import nearest
from qtrain.ptq.start import Inputs, Start


class Mse(Start[MseSection]):
    """min sum_j h_j (w_j - fq(w_j))^2 of each group; h_j = E[x_j^2] where the input was seen, else 1."""

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        """The record of one weight [out, in]; a ModelError where it is not finite."""
        weight = weight.detach()
        return nearest(weight, search_qparams(weight, spec, inputs.moment), spec)
