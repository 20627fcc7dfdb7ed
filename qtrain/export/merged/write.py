"""Write a model as a plain unquantized checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtrain.export.card import write_card
from qtrain.export.companions import write_companions
from qtrain.export.merged.config import MergedOptions
from qtrain.export.partial import partial_export
from qtrain.export.shards import ShardWriter
from qtrain.export.sizes import parse_size
from qtrain.export.writer import Progress
from qtrain.modules.deployed import DeployedModel
from qtrain.ptq.activation_stats import Calibration


def write(
    model: DeployedModel,
    options: MergedOptions,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    facts: Mapping[str, Any],
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    resume: str | None = None,
) -> dict[str, Any]:
    """Write ``directory`` and return what was done, for export.json.

    ``options.base`` is the caller's: it decides which base ``model`` merges into. ``calibration`` is of no use here.

    Raises:
        ExportError: a tensor that is not finite in ``model.dtype``.
    """
    begin = time.monotonic()
    tensors = list(model.tensors())
    with partial_export(directory, resume) as export:
        with ShardWriter(export.files, parse_size(options.max_shard_size), journal=export.journal) as shards:
            left = [tensor for tensor in tensors if not shards.holds(tensor.name)]
            for tensor in progress(left, len(left)) if progress else left:
                shards.add(tensor.name, tensor.value().to(model.dtype))
        write_companions(model, export.files, tokenizer)
        result: dict[str, Any] = {
            "format": "merged",
            "base": "trained" if model.trained_codes else options.base,
            "bytes": shards.total_bytes,
            "notes": list(model.notes),
            "dtype": str(model.dtype).removeprefix("torch."),
            "seconds": round(time.monotonic() - begin, 1),
        }
        write_card(export.files, facts, result)
    return result
