"""`quantization_config` of a GPTQ checkpoint, and which of its consumers have a kernel for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from qtrain.export.integers.plan import Plan
from qtrain.numerics.spec import QuantSpec

VLLM_GROUP_SIZES = (None, 32, 64, 128)


def quantization_config(plan: Plan, version: int) -> dict[str, Any]:
    """The description that transformers, GPTQModel and vLLM read.

    Bits and group size are those of most layers. Others are under ``dynamic``, by patterns of names; so are layers that
    stay in 16 bits, which ``modules_in_block_to_quantize`` leaves out as well: all that transformers looks at.
    """
    ((most, _),) = Counter(tuple(_options(spec).items()) for spec in plan.specs.values()).most_common(1)
    header: dict[str, Any] = {
        "quant_method": "gptq",
        **dict(most),
        "desc_act": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": False,
    }
    others = {_pattern("+", name): _options(spec) for name, spec in plan.specs.items() if _options(spec) != dict(most)}
    dynamic = others | {_pattern("-", name): {} for name in plan.kept}
    if dynamic:
        header["dynamic"] = dynamic
    if plan.kept:
        header["modules_in_block_to_quantize"] = [list(plan.specs)]
    return header


def runs_in_vllm(plan: Plan) -> bool:
    """Whether vLLM has a kernel for each layer's codes (its 0.32)."""
    return all(
        spec.symmetric and spec.bits in (4, 8) and spec.group_size in VLLM_GROUP_SIZES for spec in plan.specs.values()
    )


def kernel_notes(plan: Plan) -> Iterator[str]:
    """Consumers that have no kernel for such codes, a sentence each."""
    if not runs_in_vllm(plan):
        yield (
            "vLLM runs GPTQ codes that are symmetric, of 4 or 8 bits, a scale a row or groups of 32, 64 or 128; these "
            "run in transformers and GPTQModel"
        )
    if len({tuple(_options(spec).items()) for spec in plan.specs.values()}) > 1:
        yield (
            "layers differ in bits or group size: GPTQModel and vLLM read that under `dynamic`, transformers' loader "
            "takes one layout for all layers"
        )


def _options(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size or -1, "sym": spec.symmetric}


def _pattern(sign: str, name: str) -> str:
    return f"{sign}:^{re.escape(name)}$"
