"""Packed rows whose documents the host knows: attention document by document, in place of a mask over all pairs.

transformers finds documents by the breaks in ``position_ids``, asks the GPU whether there are any, and makes a mask
[B, 1, L, L]. Here the mask that decoder layers hand on is the documents themselves: it takes the same way through
every architecture, through recomputation too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, and_masks, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from qtrain.kernels.document_attention import document_attention, why_not_flash
from qtrain.modules.kv.attention import PREFIX, register
from qtrain.modules.unbroken_rows import looked_for, unbroken_rows

NAME = "sdpa_by_document"
"""In ``config._attn_implementation``."""
DOCUMENTS = "documents"
"""The key of a batch's places [documents + 1] at which documents begin among the tokens of all rows, and the end."""
LONGEST = "longest_document"
"""The key of a tensor [tokens of the longest, 0]: a number that the host reads off a shape, wherever the batch lies."""


class Documents(NamedTuple):
    """Of packed rows.

    Attributes:
        ends: int32 [documents + 1].
        rows, length: B and L.
    """

    ends: Tensor
    longest: int
    rows: int
    length: int

    def carried(self) -> Tensor:
        """``ends`` as often as the longest has tokens, in no more memory: what a layer is given for its mask."""
        return self.ends.expand(self.longest, -1)

    def numbers(self) -> Tensor:
        """Which document a token is of [B, L]."""
        places = torch.arange(self.rows * self.length, device=self.ends.device, dtype=self.ends.dtype)
        return torch.bucketize(places, self.ends[1:], right=True).view(self.rows, self.length)


def with_documents(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With ``DOCUMENTS`` and ``LONGEST``, found while ``position_ids`` [B, L] lie in the host's memory."""
    positions = batch.get("position_ids")
    if positions is None or positions.device.type != "cpu" or positions.ndim != 2:
        return dict(batch)
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=1) != 1  # as transformers has it
    ends = torch.cat([begins.flatten().nonzero().flatten(), torch.tensor([positions.numel()])])
    return {**batch, DOCUMENTS: ends.int(), LONGEST: torch.empty(int(ends.diff().max()), 0)}


def documents_of(batch: Mapping[str, Tensor]) -> Documents | None:
    """What ``with_documents`` found; None where it did not look."""
    if DOCUMENTS not in batch or LONGEST not in batch:
        return None
    rows, length = batch["input_ids"].shape
    return Documents(batch[DOCUMENTS], len(batch[LONGEST]), rows, length)


def attend_by_document(model: nn.Module) -> bool:
    """Let ``model`` attend document by document where ``known_rows`` tells it the documents, in place.

    Returns:
        Whether it can: it calls torch's scaled_dot_product_attention through transformers' attention interface.
    """
    configs = _configs(model)
    own = {config._attn_implementation for config in configs}
    if (
        not own
        or not own <= {"sdpa", NAME}
        or not isinstance(model, PreTrainedModel)
        or not model._can_set_attn_implementation()
    ):
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    for config in configs:
        config._attn_implementation_internal = NAME
    return True


def mask_pairs(model: nn.Module) -> None:
    """Undo ``attend_by_document``, under quantizers of keys and values too."""
    for config in _configs(model):
        name = str(config._attn_implementation)
        if name == NAME:
            config._attn_implementation_internal = "sdpa"
        elif name == PREFIX + NAME:
            config._attn_implementation_internal = register("sdpa")


def attends_by_document(model: nn.Module) -> bool:
    """Whether ``attend_by_document`` was done, under quantizers of keys and values too."""
    config: Any = getattr(model, "config", None)  # modules are too many to be looked through in each step
    return config is not None and str(config.get_text_config()._attn_implementation).endswith(NAME)


@contextmanager
def known_rows(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """What the host knows of a batch's rows, for a forward pass of ``model``: nothing is looked for on the GPU."""
    global _known
    documents = documents_of(batch) if "position_ids" in batch else None
    if documents is None or not attends_by_document(model):
        with unbroken_rows(batch):
            yield
        return
    device = next(model.parameters()).device
    before, _known = _known, documents._replace(ends=documents.ends.to(device))
    try:
        with looked_for(lambda position_ids: None):
            yield
    finally:
        _known = before


_known: Documents | None = None


def _mask(**given: Any) -> Tensor | None:
    """The documents for a layer that sees all of its own; for others the mask of pairs."""
    known = _known
    if known is None:
        found: Tensor | None = sdpa_mask(**given)
        return found
    function = given.get("mask_function", causal_mask_function)
    whole = given.get("attention_mask") is None and given["q_length"] == given["kv_length"] == known.length
    if whole and (function is causal_mask_function or _window_is_wide(known, given)):
        return known.carried()
    apart = masking_utils.packed_sequence_mask_function(known.numbers())
    found = sdpa_mask(**{**given, "mask_function": and_masks(function, apart), "allow_is_causal_skip": False})
    return found  # noqa: RET504  # untyped


def _window_is_wide(known: Documents, given: Mapping[str, Any]) -> bool:
    """Whether a layer of a sliding window, and of nothing else, sees all of the longest document."""
    window = getattr(given.get("config"), "sliding_window", None)
    return window is not None and given.get("local_size") == window >= known.longest and not given.get("use_vmap")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers' own of sdpa, [B, L, heads, D]."""
    if attention_mask is None or attention_mask.ndim == 4:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    documents = Documents(attention_mask[0], len(attention_mask), query.shape[0], query.shape[2])
    if torch.is_autocast_enabled(query.device.type):  # as for scaled_dot_product_attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    alone = len(documents.ends) == documents.rows + 1
    unknown = dropout or any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    on_gpu = query.is_cuda and why_not_flash(query, key, value) is not None  # a document after the other: no
    if alone or unknown or on_gpu:
        mask = None if alone else _pairs(documents)
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    o = document_attention(query, key, value, documents.ends, documents.longest, scaling)
    return o.transpose(1, 2).contiguous(), None


def _pairs(documents: Documents) -> Tensor:
    """Which tokens a token sees [B, 1, L, L]."""
    numbers = documents.numbers()
    return (numbers[:, :, None] == numbers[:, None, :]).tril()[:, None]


def _configs(model: nn.Module) -> list[Any]:
    """Of the decoder's attentions."""
    found = {
        id(module.config): module.config
        for module in model.modules()
        if "Attention" in type(module).__name__ and hasattr(module, "config") and hasattr(module, "layer_idx")
    }
    return list(found.values())
