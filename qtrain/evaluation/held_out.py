"""Loss over batches of prepared data, packed or padded, masked or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from qtrain.errors import DataError
from qtrain.evaluation.perplexity import Perplexity, mean_perplexity
from qtrain.evaluation.progress import progress


def held_out(
    loss: Callable[[Mapping[str, Tensor]], Tensor], batches: Iterable[Mapping[str, Tensor]], device: torch.device
) -> Perplexity:
    """Mean loss over all tokens that carry one, and its exponential.

    Args:
        loss: summed loss of a batch in nats, as ``qtrain.modules.token_loss`` has it.
        batches: with ``loss_tokens`` beside the model's inputs.

    Raises:
        DataError: no token carries loss.
    """
    total, tokens = 0.0, 0
    for batch in progress(batches, "evaluating"):
        total += float(loss({key: value.to(device) for key, value in batch.items()}))
        tokens += int(batch["loss_tokens"])
    if not tokens:
        raise DataError("no token carries loss", fix="data.train_on=all, or a larger data.max_length")
    return mean_perplexity(total, tokens)


def limited(loader: Any, wanted: int | float | None) -> Iterable[Mapping[str, Tensor]]:
    """The first ``wanted`` batches, or that share of them, as ``trainer.limit_val_batches`` has it; None: all."""
    assert isinstance(loader, Sized)
    wanted = 1.0 if wanted is None else wanted
    number = wanted if isinstance(wanted, int) else int(len(loader) * wanted)
    return _First(loader, min(number, len(loader)))


class _First:
    """The first ``number`` batches, with a length for the progress bar."""

    def __init__(self, loader: Any, number: int) -> None:
        self._loader, self._number = loader, number

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return islice(iter(self._loader), self._number)

    def __len__(self) -> int:
        return self._number
