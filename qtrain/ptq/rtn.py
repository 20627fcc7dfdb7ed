"""Each group's extremes, and each weight to its nearest code: what every other starting point must beat."""

from __future__ import annotations

from torch import Tensor

from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import QParams, choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import RtnSection
from qtrain.ptq.start import Inputs, Start


class Rtn(Start[RtnSection]):
    """s = max|w| / (2^(b-1) - 1), or from the least to the greatest with a zero point; ternary: s = mean|w|."""

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        """The record of one weight [out, in]; a ModelError where it is not finite."""
        weight = weight.detach()
        return nearest(weight, choose_qparams(weight, spec), spec)


def nearest(weight: Tensor, qparams: QParams, spec: QuantSpec) -> LinearRecord:
    """Each weight at its nearest level of the scales given."""
    return LinearRecord(quantize(weight, qparams, spec), *qparams, spec)
