"""`method.init` of quantization-aware training: which starting points there are, and what they do not go with."""

from __future__ import annotations

from collections.abc import Sequence

from qtrain.modules.config import QuantizerSection
from qtrain.registry import did_you_mean

INITS = ("rtn", "mse", "hqq", "awq", "gptq", "smoothquant")
FOLDING = ("awq", "smoothquant")
"""Of them those that also move scales between layers: the model stays the same function and rounds better."""
ELSEWHERE = {
    "spqr": "keeps outliers in 16 bits beside the codes, where no trained weight lies: init=gptq, or method.name=peqa",
    "block_ap": "is a training of its own, block by block: distill.layerwise.steps=100 is QAT's, or method.name=peqa",
    "checkpoint": "keeps the codes of a quantized checkpoint, and QAT trains 16-bit weights: method.name=peqa",
}
CONFLICTS = {
    "lora": "adapters are trained over the weights of model.path, and a start moves them",
    "start_step": "ranges are found anew when quantization sets in",
    "bits_schedule": "training begins with other formats than the codes have",
}
"""Keys that would undo a start, and why."""


def check_name(init: str) -> None:
    """Raise ValueError unless it is the name of a starting point of QAT."""
    if init in ELSEWHERE:
        raise ValueError(f"{init} {ELSEWHERE[init]}")
    if init not in INITS:
        raise ValueError(f"no such starting point; {did_you_mean(init, INITS)}")


def check_sections(init: str, weights: Sequence[QuantizerSection], *, inputs: bool) -> None:
    """Raise ValueError where quantizers would not keep what ``init`` chooses, or give it nothing to choose.

    Args:
        weights: of the layers' weights, the general one first.
        inputs: whether inputs of any layer are quantized.
    """
    if not weights:
        raise ValueError(f"init={init} chooses codes of weights, and none are quantized: set method.weight.format")
    for section in weights:
        spec = section.spec(weight=True)
        if spec.is_float or spec.format == "binary":
            raise ValueError(f"init={init} chooses codes of int2 .. int8 or ternary, not of {spec.format}: init=null")
        if spec.granularity not in ("per_channel", "per_group"):
            raise ValueError(
                f"init={init} chooses scales per_channel or per_group, not {spec.granularity}: "
                "method.weight.granularity=per_channel"
            )
    if init not in FOLDING and not any(keeps_range(section) for section in weights):
        known = weights[0].bounds is not None
        raise ValueError(
            f"init={init} chooses scales, and range: {weights[0].range}{' with bounds' if known else ''} has no place "
            "for them: method.weight.range=learned"
        )
    if init == "smoothquant" and not inputs:
        raise ValueError(
            "init=smoothquant moves the outliers of quantized inputs into the weights, and inputs are not quantized "
            "here: method.activation.format=int8, or init=awq or gptq"
        )


def keeps_range(section: QuantizerSection) -> bool:
    """Whether a weight's quantizer of this section keeps a range that was found elsewhere."""
    return section.range in ("learned", "static") and section.bounds is None
