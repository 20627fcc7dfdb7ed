"""What it cost to merge an adapter into its base and to quantize the sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtrain.export.bitsandbytes.config import KINDS
from qtrain.export.bitsandbytes.layer import frozen_layers
from qtrain.methods.config import KEPT
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.frozen_linear import frozen_kind


def merge_loss(model: DeployedModel, found: Mapping[str, Any], base: str) -> str | None:
    """The loss in a sentence, with what loses nothing; None for an export that has no such loss.

    Args:
        found: facts of the export; perplexities of both models, where they were measured.
        base: what the adapter was trained over, as method.base names it.
    """
    if model.adapted is None or "adapter" in found or not found.get("quantized_layers"):
        return None
    kinds = {base} if base != KEPT else {*map(frozen_kind, frozen_layers(model.adapted.get_base_model()).values())}
    cost = "is lossy"
    if "candidate_perplexity" in found:
        before, after = found["reference_perplexity"], found["candidate_perplexity"]
        cost = f"took perplexity from {before:.3f} to {after:.3f} ({after / before - 1:+.1%})"
    beside = ", or export.format=bitsandbytes, the adapter beside this base" if kinds <= {*KINDS} else ""
    again = " again" if base != "none" else ""
    return (
        f"the adapter was merged and the sum quantized{again}, which {cost}; nothing is lost by recipe=qat_lora_llama, "
        f"which trains fq(W + BA) on the export's own grid{beside}"
    )
