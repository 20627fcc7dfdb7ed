"""Does a model keep packed documents apart? Measured, not believed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.modules.documents import known_rows, with_documents
from qtrain.modules.eval_mode import eval_mode

LENGTHS = ((7, 9), (10, 6))
"""Documents of the two rows: back ends differ in whether they keep documents apart in batches of more than one row."""

TOLERANCE = {torch.float32: 1e-5}
REDUCED = 5e-2
"""Relative to the largest logit. Products of equal shapes are equal to the bit in bf16 too; but LLM.int8() looks for
outliers over the whole batch, so that another document moves a row by up to a few per cent."""


@torch.no_grad()
def check_isolation(model: nn.Module, vocab_size: int) -> None:
    """Exchange the first document of packed rows: the logits of the second must not notice.

    Shapes stay the same, so that rounding does, whatever the precision; against the document alone bf16 products of
    other shapes differ by 5 % of the largest logit (SmolLM2, measured), which hides a leak.

    Packed rows go in as in training: ``position_ids`` that restart, no attention mask, no cache. The model is measured
    in evaluation mode (dropout would hide everything), no random number is drawn.

    Args:
        model: a causal language model of transformers, or one wrapped by PEFT; returns ``.logits`` [B, L, V].

    Errors: ModelError with the largest difference, if it is above 1e-5 of the largest logit (5e-2 where parameters are
    not all fp32).
    """
    with eval_mode(model):
        difference, tolerance = _measure(model, vocab_size)
    if not difference <= tolerance:
        raise ModelError(
            f"packed documents see each other: logits differ by {difference:.1e} of the largest (at most {tolerance})",
            where=f"{type(model).__name__} with attention {_attention(model)!r}",
            rule="what stands before a packed document must not change its logits",
            fix="model.attention=sdpa, or data.packing=false",
        )


@torch.no_grad()
def known_difference(model: nn.Module, vocab_size: int) -> tuple[float, float]:
    """(difference, tolerance) of the logits of packed rows whose documents are known, and of those found by a mask.

    Relative to the largest logit; in evaluation mode.
    """
    with eval_mode(model):
        ids, positions = _packed(model, vocab_size)
        known, found = _logits(model, ids, positions).float(), _logits(model, ids, positions, known=False).float()
    return float((known - found).abs().max() / found.abs().max()), TOLERANCE.get(_narrowest(model), REDUCED)


def _packed(model: nn.Module, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Ids and positions of the two rows."""
    device = next(model.parameters()).device
    width = sum(LENGTHS[0])
    # Distinct tokens spread over the vocabulary, so that a leak has something to show.
    ids = (torch.arange(1, 2 * width + 1, device=device).view(2, width) * 7919) % vocab_size
    return ids, torch.tensor([[*range(first), *range(second)] for first, second in LENGTHS])


def _measure(model: nn.Module, vocab_size: int) -> tuple[float, float]:
    ids, positions = _packed(model, vocab_size)
    exchanged = ids.clone()
    for row, (first, _) in enumerate(LENGTHS):
        exchanged[row, :first] = (ids[row, :first] + vocab_size // 2) % vocab_size
    packed, other = _logits(model, ids, positions).float(), _logits(model, exchanged, positions).float()
    second = [packed[row, first:] - other[row, first:] for row, (first, _) in enumerate(LENGTHS)]
    difference = max(float(rows.abs().max()) for rows in second)
    return difference / float(packed.abs().max()), TOLERANCE.get(_narrowest(model), REDUCED)


def _logits(model: nn.Module, ids: Tensor, positions: Tensor, *, known: bool = True) -> Tensor:
    """Of packed rows; their documents ``known``, as in training, where the model takes them so."""
    batch = with_documents({"position_ids": positions}) if known else {"position_ids": positions}
    batch = {"input_ids": ids, **{key: tensor.to(ids.device) for key, tensor in batch.items()}}
    with known_rows(model, batch):
        logits: Tensor = model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits
    return logits


def _narrowest(model: nn.Module) -> torch.dtype:
    """The smallest floating type among the parameters; integer codes count as reduced."""
    types = {parameter.dtype for parameter in model.parameters()}
    return torch.float32 if types == {torch.float32} else torch.bfloat16


def _attention(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return str(getattr(config, "_attn_implementation", "unknown"))
