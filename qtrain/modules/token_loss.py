"""The summed next-token loss of a batch, by the path that fits the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qtrain.modules.documents import known_rows
from qtrain.modules.head import head_factors
from qtrain.modules.linear_cross_entropy import linear_cross_entropy, places_kept

Loss = Callable[[Mapping[str, Tensor]], Tensor]
INPUTS = ("input_ids", "attention_mask", "position_ids")
"""What of a batch the model is given."""
ROWS = "rows"
"""The key of a batch's row numbers [B] in the data set, by which cached logits are found."""


KEPT = "kept"
"""The key of a batch's places [K] among the shifted labels, row after row, that count."""


def with_kept(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With ``KEPT``, found while labels lie in the host's memory: looked for on a GPU, the host would wait for it."""
    labels = batch.get("labels")
    if labels is None or labels.device.type != "cpu" or labels.ndim != 2:
        return dict(batch)
    return {**batch, KEPT: places_kept(labels[:, 1:])}


def plain_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of -log p(label) in nats over positions 1..n-1, from the model's whole logits [B, L, vocab]."""
    inputs = {key: batch[key] for key in INPUTS if key in batch}
    with known_rows(model, batch):
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")


def chunked_loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The same sum from the decoder's hidden states, head and cross-entropy in chunks of tokens."""
    inputs = {key: batch[key] for key in INPUTS if key in batch}
    with known_rows(model, batch):
        hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    x, weight, bias = head_factors(model, hidden[:, :-1])
    return linear_cross_entropy(x, weight, batch["labels"][:, 1:], bias, kept=batch.get(KEPT))


def choose_loss(model: PreTrainedModel) -> tuple[Loss, str]:
    """The chunked path where it gives what the model gives on a probe of 8 tokens, else the plain one, and why.

    Heads differ (soft-capping, logit scales, biases in odd places): asking the model itself needs no list of them.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device)[None]
    probe = {"input_ids": ids, "labels": ids}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected, found = plain_loss(model, probe), chunked_loss(model, probe)
    except (AttributeError, TypeError, NotImplementedError) as error:
        return (lambda batch: plain_loss(model, batch)), f"whole logits: {' '.join(str(error).split())[:80]}"
    finally:
        model.train(training)
    # bf16 logits are rounded before the loss on one path and not otherwise on the other: 2 % is far below a soft-cap.
    whole = next(model.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    if not torch.allclose(expected, found, rtol=1e-4 if whole else 2e-2):
        return (lambda batch: plain_loss(model, batch)), "whole logits: this head is more than a product"
    return (lambda batch: chunked_loss(model, batch)), "head and cross-entropy in chunks"
