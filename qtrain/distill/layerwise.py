"""Each decoder block of a quantized model learns to give what its full-precision twin gives.

Layer-by-layer knowledge distillation, LKD, of ZeroQuant (Yao 2022, arXiv 2206.01861).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.errors import ModelError
from qtrain.modules.block_chain import BlockError, Chain, Context, row_order
from qtrain.modules.blocks import decoder_blocks
from qtrain.modules.eval_mode import eval_mode

Progress = Callable[[Iterator[Any], int], Iterator[Any]]
Groups = Callable[[nn.Module, float], list[dict[str, Any]]]


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
    name, blocks = decoder_blocks(student)
    if not any(p.requires_grad for p in blocks.parameters()):
        raise ModelError("no parameter of the decoder's blocks requires a gradient", where=name)
    errors = []
    with eval_mode(teacher, student):
        original, quantized = (Chain(model, rows, batch_size, context) for model in (teacher, student))
        size = original.size
        x = _entering(original, storage)
        x_student = _entering(quantized, storage) if prefix == "student" else x
        # The teacher's outputs take the place of its inputs as soon as nothing else needs those.
        target = x if prefix == "student" else torch.empty_like(x)
        numbers = iter(range(len(blocks)))
        for k in progress(numbers, len(blocks)) if progress else numbers:
            original.advance(k, x, target)
            given = x_student if prefix == "student" else x
            before = quantized.error(k, given, target)
            kept = {key: value.clone() for key, value in blocks[k].state_dict().items()}
            optimizer = torch.optim.Adam(groups(blocks[k], lr))
            for rows_of_step in row_order(len(rows), size * steps, seed + k).split(size):
                optimizer.zero_grad()
                quantized.loss(k, given[rows_of_step], target[rows_of_step], before).backward()
                optimizer.step()
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


def _entering(chain: Chain, storage: torch.dtype | None) -> Tensor:
    """What enters the first block [rows, L, d]."""
    states = torch.empty(chain.shape, dtype=storage or chain.dtype, device=chain.device)
    chain.enter(states)
    return states
