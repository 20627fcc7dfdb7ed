"""A finished run whose numbers stay in its files: for exports that nothing is run for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qtrain.config.schema import Config
from qtrain.methods.method import Method, build_method
from qtrain.methods.streamed import RunFiles, Streamed
from qtrain.models.dtype import DTYPES, resolve_dtypes
from qtrain.models.load import load_tokenizer
from qtrain.modules.deployed import DeployedModel
from qtrain.training.run_directory import RunDirectory
from qtrain.training.trained import best_device


@dataclass(frozen=True)
class StreamedRun:
    """What ``Reference`` says of a run without a forward pass, with one layer in memory at a time.

    Attributes:
        storage: dtype of what is not quantized.
    """

    config: Config
    method: Method[Any]
    tokenizer: PreTrainedTokenizerBase
    storage: torch.dtype
    _streamed: Mapping[str, Streamed]

    @classmethod
    def of(cls, config: Config, run: RunDirectory, bases: Collection[str] = ("dequantized",)) -> StreamedRun | None:
        """The run; None where its layers cannot be read one by one: a GGUF base, or one of tables.

        Args:
            bases: that its adapters will be merged into (``deployed``).

        Raises:
            ExportError: it has no adapters to merge into the original weights.
        """
        if "original" in bases:
            build_method(config.method).check_original()
        device = best_device()
        storage, compute = resolve_dtypes(config.model.dtype, config.method.compute_dtype, device)
        method = build_method(config.method)
        assert run.trained is not None  # verbs on a finished run look first
        packed = run.kept_base() if method.keeps_base else None
        files = RunFiles(config.model, packed, run.trained, storage, compute, device)
        found = {
            base: streamed
            for base in bases
            if (streamed := method.streamed(replace(files, original=base == "original"))) is not None
        }
        if len(found) < len(set(bases)):
            return None
        return cls(config, method, load_tokenizer(config.model), storage, found)

    def lines(self) -> list[str]:
        """What was done, a fact a line."""
        return self.method.lines(next(iter(self._streamed.values())).model)

    def deployed(self, base: str = "dequantized", dtype: torch.dtype | None = None) -> DeployedModel:
        """The plain checkpoint (arguments: ``Reference.deployed``)."""
        return self._streamed[base].deployed(dtype or DTYPES.get(self.config.export.dtype, self.storage))
