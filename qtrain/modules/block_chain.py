"""A decoder's blocks run one at a time, on hidden states that are held for all rows of text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qtrain.errors import DataError, ModelError
from qtrain.modules.blocks import Call, decoder_blocks, entering, watch

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class BlockError:
    """Mean squared error of a block's outputs, before and after its training."""

    name: str
    before: float
    after: float


class Chain:
    """The blocks of a decoder with the arguments it calls them with; hidden states come and go [rows, L, d].

    Hidden states may lie on another device, or in a file that is mapped to memory, and in another dtype: batches of
    them are brought to the model's and back.

    Args:
        rows: token ids [rows, L], one row at least, without padding.
        size: rows in a batch.
        context: what forward passes run in, such as an autocast.

    Attributes:
        dtype: of the hidden states, as the model computes them.
        shape: of the hidden states of all rows.

    Raises:
        DataError: rows of another shape.
        ModelError: blocks that are no chain, or whose arguments depend on the tokens.
    """

    def __init__(self, model: PreTrainedModel, rows: Tensor, size: int, context: Context = nullcontext) -> None:
        if rows.dim() != 2 or rows.numel() == 0:
            raise DataError(f"rows of shape {list(rows.shape)}", rule="token ids [rows, tokens], one row at least")
        self.name, self.blocks = decoder_blocks(model)
        self.model, self.rows, self.context = model, rows, context
        self.size = min(size, len(rows))
        self.device = next(model.parameters()).device
        self._calls: dict[int, list[Call]] = {}
        hidden, calls = self._watch(rows[: self.size])
        self._calls[self.size] = calls
        second = rows[self.size : 2 * self.size]
        if len(second) == self.size and not all(map(Call.same, calls, self._watch(second)[1])):
            raise self._token_dependent()
        self.dtype = hidden.dtype
        self.shape = (len(rows), *hidden.shape[1:])

    def enter(self, outputs: Tensor) -> None:
        """Write what enters the first block for all rows."""
        finite = []
        for ids, y in zip(self.rows.split(self.size), outputs.split(self.size), strict=True):
            with self.context():
                hidden, call = entering(self.model, self.blocks, ids.to(self.device))
            if not call.same(self._calls_for(len(ids))[0]):
                raise self._token_dependent()
            finite.append(_write(hidden, y))
        _check(finite, f"what enters {self.name}.0", outputs.dtype)

    @torch.no_grad()
    def advance(self, k: int, inputs: Tensor, outputs: Tensor) -> None:
        """Write the outputs of block k for all rows; ``outputs`` may be ``inputs``.

        Raises:
            DataError: they hold NaN or inf.
        """
        batches = zip(inputs.split(self.size), outputs.split(self.size), strict=True)
        finite = [_write(self.run(k, x), y) for x, y in batches]
        _check(finite, f"what leaves {self.name}.{k}", outputs.dtype)

    def run(self, k: int, hidden: Tensor, block: nn.Module | None = None) -> Tensor:
        """The output [B, L, d] of block k, or of another one in its place."""
        # Autocast would go on with its first copy of each bias and norm, whatever a step changed.
        torch.clear_autocast_cache()
        call = self._calls_for(len(hidden))[k]
        with self.context():
            return call(self.blocks[k] if block is None else block, hidden.to(self.device, self.dtype))

    @torch.no_grad()
    def error(
        self, k: int, inputs: Tensor, target: Tensor, block: nn.Module | None = None, rows: Tensor | None = None
    ) -> float:
        """Mean squared error of the outputs of block k, or of another one in its place; on some rows, or on all."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        chosen = torch.arange(len(inputs)) if rows is None else rows
        for batch in chosen.split(self.size):
            output, wanted = self.run(k, inputs[batch], block), target[batch].to(self.device)
            total += F.mse_loss(output.float(), wanted.float(), reduction="sum")
        return float(total) / (len(chosen) * target[0].numel())

    def loss(self, k: int, x: Tensor, target: Tensor, unit: float, block: nn.Module | None = None) -> Tensor:
        """Mean squared error on one batch, in units of the error before any training.

        Gradients of an error of 1e-6 would be no larger than Adam's eps.
        """
        error = F.mse_loss(self.run(k, x, block).float(), target.to(self.device).float())
        return error / max(unit, torch.finfo(torch.float32).tiny)

    def _calls_for(self, rows: int) -> list[Call]:
        """How the blocks are called with that many rows."""
        if rows not in self._calls:
            self._calls[rows] = self._watch(self.rows[:rows])[1]
        return self._calls[rows]

    def _watch(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        with self.context():
            return watch(self.model, self.blocks, ids.to(self.device))

    def _token_dependent(self) -> ModelError:
        return ModelError(
            f"{type(self.model).__name__} gives its blocks arguments that depend on the tokens",
            rule="training block by block calls each with the arguments seen on the first rows",
        )


def row_order(rows: int, count: int, seed: int) -> Tensor:
    """``count`` row numbers: one permutation of all rows after the other."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // rows)
    return torch.cat([torch.randperm(rows, generator=generator) for _ in range(rounds)])[:count]


def _write(states: Tensor, place: Tensor) -> Tensor:
    """Store a batch of states; for each row whether all that was stored is finite."""
    stored = states.to(place.dtype)
    place.copy_(stored)
    return stored.isfinite().flatten(1).all(dim=1)


def _check(finite: list[Tensor], what: str, dtype: torch.dtype) -> None:
    rows = torch.cat(finite)
    if not bool(rows.all()):
        raise DataError(
            f"{what} holds NaN or inf on {int((~rows).sum())} of {len(rows)} rows "
            f"(the first is row {int((~rows).nonzero()[0])})",
            rule=f"hidden states are finite numbers of {str(dtype).removeprefix('torch.')}",
        )
