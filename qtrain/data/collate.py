"""From rows of samples to a batch of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtrain.data.sample import IGNORED, Sample

Row = Sequence[Sample]
Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Row]], Batch]


def collate_packed(rows: Sequence[Row], *, pad: int, length: int) -> Batch:
    """Rows of several samples → ``input_ids``, ``labels``, perhaps ``position_ids`` [B, L], and the two counts.

    ``position_ids`` restart at 0 with each sample and at the padding, by which transformers keeps samples apart when it
    gets no attention mask and no cache. They are left out where every row is one sample without padding: attention
    then takes its causal path, which needs no mask. A batch with a packed row has L = ``length``, so that shapes stay
    the same; one of single samples, such as the windows of a text, is as long as its longest.

    Args:
        pad: id of the padding token.
        length: ``data.max_length``.
    """
    packed = any(len(row) > 1 for row in rows)
    width = length if packed else max(len(sample) for row in rows for sample in row)
    batch = _fill(rows, pad, width)
    used = [sum(len(sample) for sample in row) for row in rows]
    if packed or min(used) < width:
        positions = torch.empty(len(rows), width, dtype=torch.int64)
        for line, row, tokens in zip(positions, rows, used, strict=True):
            parts = [len(sample) for sample in row] + [width - tokens]
            torch.cat([torch.arange(part) for part in parts], out=line)
        batch["position_ids"] = positions
    return batch


def collate_padded(rows: Sequence[Row], *, pad: int) -> Batch:
    """Rows of one sample each → ``input_ids``, ``labels`` [B, L], the counts, and ``attention_mask`` if any is padded.

    L is the longest sample of the batch; padding stands at the right.
    """
    used = torch.tensor([len(row[0]) for row in rows])
    width = int(used.max())
    batch = _fill(rows, pad, width)
    if int(used.min()) < width:
        batch["attention_mask"] = (torch.arange(width) < used[:, None]).long()
    return batch


def _fill(rows: Sequence[Row], pad: int, width: int) -> Batch:
    """Ids, labels, ``tokens`` (all but padding) and ``loss_tokens`` (labels that the shifted loss sees)."""
    input_ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    tokens = 0
    for number, row in enumerate(rows):
        at = 0
        for sample in row:
            input_ids[number, at : at + len(sample)] = torch.tensor(sample.input_ids)
            labels[number, at : at + len(sample)] = torch.tensor(sample.labels)
            at += len(sample)
        tokens += at
    return {
        "input_ids": input_ids,
        "labels": labels,
        "tokens": torch.tensor(tokens),
        "loss_tokens": (labels[:, 1:] != IGNORED).sum(),
    }
