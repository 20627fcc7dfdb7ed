"""ReLU and its kin replaced by a clipping activation whose bound is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtrain.modules.config import QuantizerSection
from qtrain.modules.quantizer import Quantizer

REPLACED = (nn.ReLU, nn.ReLU6)


class PactActivation(nn.Module):
    """y = fq(clip(x, 0, alpha)) in place of a ReLU (PACT, Choi 2018, arXiv 1805.06085).

    Args:
        section: an asymmetric integer format with range pact: 2^b - 1 steps from 0 to alpha.
    """

    def __init__(self, section: QuantizerSection) -> None:
        super().__init__()
        self.quantizer = Quantizer(section)

    def forward(self, x: Tensor) -> Tensor:
        """x's shape; a plain ReLU while its quantizer is off or only looks."""
        if self.quantizer.observer is not None or not self.quantizer.enabled:
            x = torch.relu(x)
        result: Tensor = self.quantizer(x)
        return result
