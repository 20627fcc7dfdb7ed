"""Block-AP: all parameters of one block after the other learn to be quantized (the first half of EfficientQAT)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.errors import DataError, ModelError
from qtrain.modules.block_chain import BlockError, Chain, Context
from qtrain.modules.blocks import decoder_blocks
from qtrain.modules.eval_mode import eval_mode
from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import INTEGER_BITS, QuantSpec
from qtrain.ptq.block_cache import BlockCache, digest, tensor_digest
from qtrain.ptq.block_training import BlockTraining
from qtrain.ptq.config import BlockApSection
from qtrain.ptq.prefix import Prefixes
from qtrain.registry import did_you_mean

Place = Callable[[str, nn.Linear, LinearRecord], None]
Progress = Callable[[Iterator[Any], int], Iterator[Any]]


def block_ap(
    model: PreTrainedModel,
    specs: Mapping[str, QuantSpec],
    rows: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    *,
    place: Place,
    options: BlockApSection | None = None,
    context: Context = nullcontext,
    cache: Path | None = None,
    storage: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    report: Callable[[BlockError], None] | None = None,
) -> list[BlockError]:
    """Train W, s and z of each block to minimise mean (B_q(x) - B(t))^2, and place their codes, block after block.

    t is what enters block B in the full-precision model, x what enters it behind the blocks that were placed already:
    later blocks make up for errors of earlier ones (Chen 2024, arXiv 2407.11062). W, s and z are fp32 masters, fq as in
    LSQ+; they begin at the codes of ``options.start``, where the paper has round-to-nearest. Adam, cosine to 5 %; the
    epoch with the least error on the rows held out is kept, or the start where none was better. Norms, biases and other
    layers of the block do not train.

    Measured on block 0 of SmolLM2-135M, int2 g64 with zero points, 32 rows of 256 tokens, 2 epochs of 15 steps, error
    on other text: round-to-nearest 0.885, GPTQ 0.247; from the range of least squared error 0.797, from GPTQ's codes
    0.229 (lr 1e-4 for all), 0.238 at the paper's learning rates, 0.201 at 3e-4, 0.234 at 1e-3.

    Held at a time: the model, one block in training, and the hidden states of all rows twice, behind the blocks in
    full precision and behind the placed ones; in memory of the CPU or, with a ``cache``, in files (three of
    rows * L * d numbers while one is written) that batches are read from.

    Args:
        model: in full precision, any transformers decoder; it is changed by ``place`` alone.
        specs: integers of 2 to 8 bits by the full names of linear layers.
        rows: token ids [rows, L], or rows of one length [L] or [b, L], without padding.
        place: puts a quantized layer into the model, as new weights or as another module of that name; what comes
            after it runs through it.
        context: what forward passes run in, such as an autocast.
        cache: a directory; a run that was stopped goes on with the next block and gives the same codes.
        storage: dtype in which hidden states are held; default: as they are computed.
        seed: of the rows held out and of the order of the others.
        progress: wraps the loop over the steps of all blocks.
        report: is told of each block when it is placed.

    Raises:
        DataError: no rows, rows of several lengths, hidden states that are not finite.
        ModelError: a name that is no linear layer of a block; blocks that are no chain.
        CheckpointError: the cache is of another model, other layers, rows or options.
    """
    options = options or BlockApSection()
    ids = _one_tensor(rows)
    prefix, blocks = _names_in_blocks(model, specs)
    store = None if cache is None else BlockCache(cache, _key(model, specs, ids, options, context, storage, seed))
    done = store.done if store else 0
    errors: list[BlockError] = []
    with eval_mode(model):
        run = None
        if done < len(blocks):
            chain = Chain(model, ids, options.batch_size, context)
            hidden = Prefixes(chain, storage or chain.dtype, cache, done)
            run = _Run(BlockTraining(chain, options, seed), hidden, progress, sum(map(bool, blocks[done:])))
        for k, names in enumerate(blocks):
            layers = {name: _linear(model, name) for name in names}
            if k < done or run is None:
                assert store is not None
                records, error = store.load(k, layers, specs)
            else:
                records, error = run.block(k, f"{prefix}.{k}", {name: specs[name] for name in names})
                if store:
                    store.save(k, records, error)
            for name, record in records.items():
                place(name, layers[name], record)
                model.get_submodule(name).eval()
            errors.append(error)
            if report and k >= done:
                report(error)
        if run:
            run.finish()
    return errors


class _Run:
    """The blocks that are left to train.

    Args:
        blocks: how many have a layer to train.
    """

    def __init__(self, training: BlockTraining, hidden: Prefixes, progress: Progress | None, blocks: int) -> None:
        self.training, self.hidden = training, hidden
        total = blocks * training.options.epochs * training.steps
        self.ticks = progress(iter(range(total)), total) if progress else iter(range(total))

    def block(self, k: int, name: str, specs: Mapping[str, QuantSpec]) -> tuple[dict[str, LinearRecord], BlockError]:
        """Records by full name, and the error on the rows held out."""
        inner = {key.removeprefix(f"{name}."): spec for key, spec in specs.items()}
        found = self.training.train(k, inner, *self.hidden.around(k), self.ticks)
        records = {f"{name}.{key}": record for key, record in found.records.items()}
        return records, BlockError(name, found.before, found.after)

    def finish(self) -> None:
        """Let go of the hidden states, and of the progress bar: it ends when it is asked for more."""
        next(self.ticks, None)
        self.hidden.remove()


def _one_tensor(rows: Tensor | Sequence[Tensor] | Sequence[Sequence[int]]) -> Tensor:
    """Token ids [rows, L]."""
    if isinstance(rows, Tensor):
        return rows
    parts = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    lengths = sorted({part.shape[-1] for part in parts})
    if len(lengths) != 1:
        raise DataError(
            f"rows of {len(lengths)} lengths, from {lengths[0]} to {lengths[-1]} tokens" if lengths else "no rows",
            rule="a block trains on hidden states of all rows, held as one tensor [rows, tokens, features]",
            fix="data.packing=true makes rows of one length" if lengths else None,
        )
    return torch.cat([part.reshape(-1, lengths[0]) for part in parts])


def _names_in_blocks(model: PreTrainedModel, specs: Mapping[str, QuantSpec]) -> tuple[str, list[list[str]]]:
    """The full name of the list of blocks, and the names of ``specs`` in each block up to the last that has one."""
    modules = dict(model.named_modules())
    blocks = decoder_blocks(model)[1]
    prefix = next(name for name, module in modules.items() if module is blocks)
    names = [[name for name in specs if name.startswith(f"{prefix}.{k}.")] for k in range(len(blocks))]
    inside = set().union(*names)
    for name, spec in specs.items():
        if name not in modules:
            raise ModelError(f"there is no module {name!r} to quantize", fix=did_you_mean(name, modules))
        if type(modules[name]) is not nn.Linear:
            raise ModelError(f"{name!r} is a {type(modules[name]).__name__}", rule="plain linear layers are quantized")
        if name not in inside:
            raise ModelError(
                f"{name!r} lies outside of {prefix}",
                rule="Block-AP trains the layers of the decoder's blocks",
                fix="leave it as it is, or quantize it alone: init=gptq, init=mse",
            )
        if spec.format not in INTEGER_BITS:
            raise ModelError(f"{spec.format} for {name!r}", rule="ranges of int2 .. int8 train")
    last = max((k for k, own in enumerate(names) if own), default=-1)
    return prefix, names[: last + 1]


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _key(
    model: PreTrainedModel,
    specs: Mapping[str, QuantSpec],
    rows: Tensor,
    options: BlockApSection,
    context: Context,
    storage: torch.dtype | None,
    seed: int,
) -> dict[str, str]:
    """All that the codes depend on."""
    kind = model.device.type
    with context():
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return {
        "model": tensor_digest(model.state_dict()),
        "layers": digest({name: spec.to_dict() for name, spec in specs.items()}),
        "rows": tensor_digest({"rows": rows}, samples=None),
        "compute": f"{compute}",
        "storage": f"{storage}",
        "seed": f"{seed}",
        **{key: f"{value}" for key, value in options.model_dump(exclude={"rows"}).items()},
    }
