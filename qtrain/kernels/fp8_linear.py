"""y = fq(x) fq(W)^T + b as a product of e4m3 codes: the arithmetic of fp8 deployment, with a straight-through backward.

The codes are the trained quantizer's, which divides by the scale; ``fp8_rows`` multiplies with its inverse.
"""

from __future__ import annotations

from torch import Tensor

from qtrain.kernels.fp8_product import fp8_units_take
from qtrain.kernels.int8_linear import code_linear
from qtrain.numerics.rules import Dynamic, Learned, Rule, Static

FORMAT = "fp8_e4m3"
"""The one that fp8 units multiply with itself; e5m2 they take on one side alone."""


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    weight_rule: Rule,
    input_rule: Rule,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Linear layer whose forward multiplies fp8 codes: y[t, o] = s_x[t] s_w[o] sum_k q_x[t, k] q_w[o, k] + b[o].

    As ``int8_linear`` in all else: the simulated layer's codes, of x a byte a number saved, its backward.

    Args:
        x: [.., in]. weight: [out, in]. bias: [out].
        weight_scale: [out, 1], or [1, 1] for all, of a range that is kept.
    """
    return code_linear(x, weight, bias, weight_rule=weight_rule, input_rule=input_rule, weight_scale=weight_scale)


def lacks_fp8_product(weight: Rule | None, inputs: Rule | None, out: int, width: int) -> str | None:
    """Why a layer of these rules and widths has no product of fp8 codes; None where it has one."""
    if weight is None or inputs is None:
        return "inputs are not quantized" if inputs is None else "weights are not quantized"
    for name, rule in (("inputs", inputs), ("weights", weight)):
        if rule.spec.format != FORMAT:
            return f"{name} are {rule.spec.format}, not {FORMAT}"
    if type(inputs) is not Dynamic or inputs.spec.granularity not in ("per_token", "per_tensor"):
        return "inputs are not dynamic by token, or as a whole"
    if type(weight) not in (Dynamic, Learned, Static) or weight.spec.granularity not in ("per_channel", "per_tensor"):
        return f"weights have scales {weight.spec.granularity}, neither one a row nor one for all"
    return None if fp8_units_take(width, out) else f"widths of {width} x {out} are no multiples of 16"
