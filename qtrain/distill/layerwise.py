"""Each decoder block of a quantized model learns to give what its full-precision twin gives.

Layer-by-layer knowledge distillation, LKD, of ZeroQuant (Yao 2022, arXiv 2206.01861).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qtrain.modules.blocks import Call, decoder_blocks, watch
from qtrain.distill.eval_mode import eval_mode
from qtrain.errors import DataError, ModelError

Progress = Callable[[Iterator[Any], int], Iterator[Any]]
Context = Callable[[], AbstractContextManager[Any]]
Groups = Callable[[nn.Module, float], list[dict[str, Any]]]


@dataclass(frozen=True)
class BlockError:
    """Mean squared error of a block's outputs over all rows, before and after its training."""

    name: str
    before: float
    after: float


def trained_parameters(block: nn.Module, lr: float) -> list[dict[str, Any]]:
    """One group of all that requires a gradient."""
    return [{"params": [p for p in block.parameters() if p.requires_grad], "lr": lr}]


def distill_layerwise(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    rows: Tensor,
    *,
    steps: int,
    lr: float,
    batch_size: int = 8,
    prefix: Literal["teacher", "student"] = "teacher",
    storage: torch.dtype | None = None,
    groups: Groups = trained_parameters,
    context: Context = nullcontext,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[BlockError]:
    """Train block k of ``student`` to minimise mean (S_k(x) - T_k(t))^2, one block after the other.

    t is the teacher's input of block k; x = t, or what the student's blocks before it give (then errors of earlier
    blocks are made up for, as in EfficientQAT's Block-AP, Chen 2024, arXiv 2407.11062). Held at a time: the inputs and
    the outputs of one block for all rows. A block whose training did not lower its error is put back.

    Args:
        teacher: in full precision, on the student's device.
        student: its copy with quantized layers; what requires a gradient trains.
        rows: token ids [rows, L], without padding.
        steps: of each block.
        lr: of Adam.
        prefix: whose blocks give x.
        storage: dtype in which inputs and outputs are held; default: as they are computed.
        groups: the optimizer's groups for one block, as ``Method.parameter_groups``.
        context: what forward passes run in, such as an autocast.
        seed: of the order of rows.
        progress: wraps the loop over blocks.

    Raises:
        ModelError: nothing trains; blocks that are no chain, or whose arguments depend on the tokens.
        DataError: no rows.
    """
    if rows.dim() != 2 or rows.numel() == 0:
        raise DataError(f"rows of shape {list(rows.shape)}", rule="token ids [rows, tokens], one row at least")
    name, blocks = decoder_blocks(student)
    if not any(p.requires_grad for p in blocks.parameters()):
        raise ModelError("no parameter of the decoder's blocks requires a gradient", where=name)
    size = min(batch_size, len(rows))
    errors = []
    with eval_mode(teacher, student):
        original, x = _chain(teacher, rows, size, storage, context)
        # Where x = t, one batch of each size tells all that is wanted of the student's prefix: its arguments.
        own = rows if prefix == "student" else rows[: size + len(rows) % size]
        quantized, x_student = _chain(student, own, size, storage, context)
        # The teacher's outputs take the place of its inputs as soon as nothing else needs those.
        target = x if prefix == "student" else torch.empty_like(x)
        numbers = iter(range(len(blocks)))
        for k in progress(numbers, len(blocks)) if progress else numbers:
            original.advance(k, x, target)
            given = x_student if prefix == "student" else x
            before = quantized.error(k, given, target)
            kept = {key: value.clone() for key, value in blocks[k].state_dict().items()}
            optimizer = torch.optim.Adam(groups(blocks[k], lr))
            for rows_of_step in _order(len(rows), size * steps, seed + k).split(size):
                quantized.step(k, given[rows_of_step], target[rows_of_step], optimizer, unit=before)
            optimizer.zero_grad()
            after = quantized.error(k, given, target)
            if not after < before:
                blocks[k].load_state_dict(kept)
                after = before
            errors.append(BlockError(f"{name}.{k}", before, after))
            if prefix == "student":
                quantized.advance(k, x_student, x_student)
            else:
                x, target = target, x
    return errors


@dataclass(frozen=True)
class _Chain:
    """A model's blocks with the arguments for each number of rows; hidden states come and go [rows, L, d]."""

    blocks: nn.ModuleList
    calls: dict[int, list[Call]]
    size: int
    dtype: torch.dtype
    context: Context

    def run(self, k: int, hidden: Tensor) -> Tensor:
        # Autocast would go on with its first copy of each bias and norm, whatever a step changed.
        torch.clear_autocast_cache()
        with self.context():
            return self.calls[len(hidden)][k](self.blocks[k], hidden.to(self.dtype))

    @torch.no_grad()
    def advance(self, k: int, inputs: Tensor, outputs: Tensor) -> None:
        """Write the outputs of block k for all rows; ``outputs`` may be ``inputs``."""
        for x, y in zip(inputs.split(self.size), outputs.split(self.size), strict=True):
            y.copy_(self.run(k, x))

    @torch.no_grad()
    def error(self, k: int, inputs: Tensor, target: Tensor) -> float:
        """Mean squared error of the outputs of block k."""
        total = torch.zeros((), dtype=torch.float64, device=inputs.device)
        for x, y in zip(inputs.split(self.size), target.split(self.size), strict=True):
            total += F.mse_loss(self.run(k, x).float(), y.float(), reduction="sum")
        return float(total) / target.numel()

    def step(self, k: int, x: Tensor, target: Tensor, optimizer: torch.optim.Optimizer, unit: float) -> None:
        """One step on one batch."""
        optimizer.zero_grad()
        # In units of the error before: gradients of an error of 1e-6 would be no larger than Adam's eps.
        loss = F.mse_loss(self.run(k, x).float(), target.float()) / max(unit, torch.finfo(torch.float32).tiny)
        loss.backward()
        optimizer.step()


def _chain(
    model: PreTrainedModel, rows: Tensor, size: int, storage: torch.dtype | None, context: Context
) -> tuple[_Chain, Tensor]:
    """The model's blocks, watched on all batches, and what enters the first of them [rows, L, d]."""
    blocks = decoder_blocks(model)[1]
    calls: dict[int, list[Call]] = {}
    device, entering = next(model.parameters()).device, torch.empty(0)
    for number, ids in enumerate(rows.split(size)):
        with context():
            hidden, seen = watch(model, blocks, ids.to(device))
        if number == 0:
            entering = hidden.new_empty(len(rows), *hidden.shape[1:], dtype=storage or hidden.dtype)
        entering[number * size :][: len(ids)] = hidden
        first = calls.setdefault(len(ids), seen)
        if not all(map(Call.same, first, seen)):
            raise ModelError(
                f"{type(model).__name__} gives its blocks arguments that depend on the tokens",
                rule="layer-wise distillation calls each block with the arguments seen on the first rows",
            )
    return _Chain(blocks, calls, size, hidden.dtype, context), entering


def _order(rows: int, count: int, seed: int) -> Tensor:
    """``count`` row numbers: one permutation of all rows after the other."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // rows)
    return torch.cat([torch.randperm(rows, generator=generator) for _ in range(rounds)])[:count]
