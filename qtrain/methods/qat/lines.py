"""What quantization-aware training did to a model, in words."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from qtrain.methods.qat.start_config import FOLDING
from qtrain.modules.config import QuantizerSection
from qtrain.modules.quant_linear import QuantLinear


def described(section: QuantizerSection | None, *, weight: bool) -> str:
    """A quantizer in words: ``int4 symmetric, per_group(64), learned``."""
    if section is None:
        return ""
    spec = section.spec(weight=weight)
    size = f"({spec.group_size})" if spec.group_size else ""
    levels = "half-integer levels" if spec.mid_rise else "symmetric" if spec.symmetric else "asymmetric"
    return f"{spec.format} {levels}, {spec.granularity}{size}, {section.range}"


def start_line(init: str, model: nn.Module, begun: Sequence[str] | None) -> str:
    """``start  gptq, 14 layers begin at its codes``, and which layers could not.

    Args:
        begun: layers that did; None where the start is not known, for its weights were restored.
    """
    line = f"start       {init}"
    if begun is None:
        return line
    weights = [one for one in model.modules() if isinstance(one, QuantLinear) and one.weight_quantizer is not None]
    forgetful = len(weights) - len(begun)
    if begun:
        line += f", {len(begun)} layers begin at its codes"
    if forgetful:
        line += f", {forgetful} layers keep no ranges (method.weight.range=learned would)"
        line += " and have the scales that it moved between layers" if init in FOLDING else ""
    return line
