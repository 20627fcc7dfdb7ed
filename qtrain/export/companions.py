"""The files beside the weights that make a directory loadable: config, generation config, tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qtrain.modules.deployed import DeployedModel


def write_companions(
    model: DeployedModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    quantization_config: dict[str, Any] | None = None,
) -> None:
    """Write config.json, generation_config.json and the tokenizer with its chat template."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if quantization_config is not None:
        config.quantization_config = quantization_config
    config.dtype = model.dtype
    config.name_or_path = ""  # where the base lay on this machine is no business of the reader's
    if not config.architectures:
        # A GGUF load leaves it empty; vLLM chooses its model class by it.
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
