"""The base of an export with the adapter that lies beside it."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel

from qtrain.errors import ModelError
from qtrain.models.config import ModelSection
from qtrain.models.load import load_model

ADAPTER = "adapter"
"""Folder of the adapter in an export: beside the base's config.json transformers would put it on by itself, in the
model's dtype (5.23), and read another base where the directory comes from the hub."""
REPACKING = (
    "bitsandbytes, on this CPU (AVX512-BF16), rounds the scales of blocks to bf16 when a model is first evaluated; "
    "measured without that, as other CPUs and GPUs compute it"
)


def load_beside(
    directory: Path, dtype: torch.dtype, *, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, str | None]:
    """As ``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(D), D, subfolder="adapter")`` has it; a note.

    Raises:
        ModelError: the base or the adapter cannot be loaded.
    """
    model = load_model(ModelSection(path=str(directory)), dtype, device=device)
    note = None
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and module.support_avx512bf16_for_cpu:
            module.support_avx512bf16_for_cpu = False
            note = REPACKING if torch.device(device).type == "cpu" else None
    return with_adapter(model, directory), note


def with_adapter(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """``model`` with the adapter of ``directory``/adapter around its layers; itself where there is none.

    Raises:
        ModelError: the adapter does not fit.
    """
    folder = directory / ADAPTER
    if not (folder / "adapter_config.json").is_file():
        return model
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ModelError(
            f"no {SAFETENSORS_WEIGHTS_NAME}",
            where=str(folder),
            rule="weights are read from safetensors alone: pickle runs code",
            fix="export it again",
        )
    try:
        adapted = PeftModel.from_pretrained(model, str(folder)).eval().get_base_model()
    except Exception as error:  # its own adapter_config.json decides what PEFT makes of it: it raises anything
        raise ModelError(
            f"the adapter cannot be put on: {' '.join(str(error).split())[:400]}",
            where=str(folder),
            rule="an adapter of PEFT that fits the model it lies in",
            fix="export it again",
        ) from None
    assert isinstance(adapted, PreTrainedModel)
    return adapted
