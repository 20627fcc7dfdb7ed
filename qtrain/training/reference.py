"""The trained model as that which its exports are written from and measured against."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtrain.config.schema import Config
from qtrain.data.datamodule import LanguageData
from qtrain.data.sample import Sample
from qtrain.evaluation.config import GenerateSection
from qtrain.evaluation.drift import Drift, drift
from qtrain.evaluation.generation import generate_ids
from qtrain.models.dtype import DTYPES, resolve_dtypes
from qtrain.models.load import load_model
from qtrain.models.stored import stored_weights
from qtrain.modules.deployed import DeployedModel
from qtrain.ptq.activation_stats import Calibration
from qtrain.training.module import LanguageModule
from qtrain.training.run_directory import RunDirectory
from qtrain.training.trained import best_device, trained_module

PROMPT_TOKENS = 32
GREEDY_TOKENS = 64


@dataclass(frozen=True)
class Reference:
    """A finished run's model with its data.

    Attributes:
        storage: dtype of what is not quantized.
        compute: dtype of the products.
    """

    config: Config
    module: LanguageModule
    model: nn.Module
    data: LanguageData
    storage: torch.dtype
    compute: torch.dtype

    @classmethod
    def of(cls, config: Config, run: RunDirectory) -> Reference:
        """The model as the last training step left it, on the best device there is."""
        device = best_device()
        module = trained_module(config, run, device)
        assert module.model is not None
        data = LanguageData(config.data, module.tokenizer, seed=config.run.seed)
        data.setup("fit")
        storage, compute = resolve_dtypes(config.model.dtype, config.method.compute_dtype, device)
        return cls(config, module, module.model, data, storage, compute)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model."""
        return self.module.tokenizer

    def lines(self) -> list[str]:
        """What was done, a fact a line."""
        return self.module.method.lines(self.model)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model inside."""
        return self.module.method.plain_model(self.model)

    def context(self) -> AbstractContextManager[None]:
        """The autocast that it was trained under."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute == torch.bfloat16)

    def deployed(self, base: str = "dequantized", dtype: torch.dtype | None = None) -> DeployedModel:
        """The plain checkpoint.

        Args:
            base: of an adapter: dequantized, which was trained on, or original, loaded anew.
            dtype: of what stays unquantized; default: as ``export.dtype`` has it.
        """
        weights: Mapping[str, Tensor] | None = None
        if base == "original":
            self.module.method.check_original()
            stored = stored_weights(self.config.model, torch.float32)
            weights = load_model(self.config.model, torch.float32).state_dict() if stored is None else stored[1]
        dtype = dtype or DTYPES.get(self.config.export.dtype, self.storage)
        return self.module.method.deployed(self.model, dtype=dtype, base=weights)

    def calibration(self, rows: int) -> Calibration | None:
        """The live model and so many rows of its training text, for formats that ask for it."""
        if not rows:
            return None
        samples = self.data.samples("train", rows * self.data.section.max_length)
        return Calibration(self.plain, [_ids(sample) for sample in samples], partial(self.context))

    def drift(self, candidate: PreTrainedModel) -> Drift:
        """How far ``candidate`` is from it, on ``export.evaluate_windows`` windows of held-out text."""
        samples = self._held_out()
        rows = [_ids(sample).to(candidate.device) for sample in samples]
        return drift(self.plain, candidate, rows, labels=[torch.tensor([sample.labels]) for sample in samples])

    def continuation(self, model: PreTrainedModel) -> list[int]:
        """The 64 likeliest tokens, one after the other, after 32 of held-out text; fewer where the text ends."""
        prompt = self._held_out()[0].input_ids[:PROMPT_TOKENS]
        greedy = GenerateSection(strategy="greedy", max_new_tokens=GREEDY_TOKENS)
        (answer,) = generate_ids(model, self.module.tokenizer, [prompt], greedy)
        return answer.tokens

    def _held_out(self) -> list[Sample]:
        split = "train" if self.config.data.validation is None else "validation"
        return self.data.samples(split, self.config.export.evaluate_windows * self.config.data.max_length)


def _ids(sample: Sample) -> Tensor:
    return torch.tensor([sample.input_ids])
