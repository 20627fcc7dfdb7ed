"""Does a model keep packed documents apart? Measured, not believed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError

LENGTHS = ((7, 9), (10, 6))
"""Documents of the two rows: back ends differ in whether they keep documents apart in batches of more than one row."""

TOLERANCE = {torch.float32: 1e-5}
REDUCED = 5e-2
"""Relative to the largest logit: bf16, fp16 and TF32 products of other shapes differ by up to a few per cent."""


@torch.no_grad()
def check_isolation(model: nn.Module, vocab_size: int) -> None:
    """Compare the logits of documents packed into rows with those of each document alone.

    Packed rows go in as in training: ``position_ids`` that restart, no attention mask, no cache. The model is measured
    in evaluation mode (dropout would hide everything), no random number is drawn.

    Args:
        model: a causal language model of transformers, or one wrapped by PEFT; returns ``.logits`` [B, L, V].

    Errors: ModelError with the largest difference, if it is above 1e-5 of the largest logit (fp32; 5e-2 where products
    are reduced to bf16, fp16 or TF32).
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        difference, tolerance = _measure(model, vocab_size)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not difference <= tolerance:
        raise ModelError(
            f"packed documents see each other: logits differ by {difference:.1e} of the largest (at most {tolerance})",
            where=f"{type(model).__name__} with attention {_attention(model)!r}",
            rule="a packed document must get the logits it gets alone",
            fix="model.attention=sdpa, or data.packing=false",
        )


def _measure(model: nn.Module, vocab_size: int) -> tuple[float, float]:
    device = next(model.parameters()).device
    width = sum(LENGTHS[0])
    # Distinct tokens spread over the vocabulary, so that a leak has something to show.
    ids = (torch.arange(1, 2 * width + 1, device=device).view(2, width) * 7919) % vocab_size
    positions = torch.tensor([[*range(first), *range(second)] for first, second in LENGTHS], device=device)
    packed = _logits(model, ids, positions)
    differences = []
    for row, (first, _) in enumerate(LENGTHS):
        for part in (slice(0, first), slice(first, width)):
            alone = _logits(model, ids[row : row + 1, part], None)
            differences.append((packed[row, part].float() - alone[0].float()).abs().max())
    largest = packed.float().abs().max()
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    tolerance = REDUCED if tf32 else TOLERANCE.get(_narrowest(model), REDUCED)
    return float(torch.stack(differences).max() / largest), tolerance


def _logits(model: nn.Module, ids: Tensor, positions: Tensor | None) -> Tensor:
    extra = {} if positions is None else {"position_ids": positions}
    logits: Tensor = model(input_ids=ids, use_cache=False, **extra).logits
    return logits


def _narrowest(model: nn.Module) -> torch.dtype:
    """The smallest floating type among the parameters; integer codes count as reduced."""
    types = {parameter.dtype for parameter in model.parameters()}
    return torch.float32 if types == {torch.float32} else torch.bfloat16


def _attention(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return str(getattr(config, "_attn_implementation", "unknown"))
