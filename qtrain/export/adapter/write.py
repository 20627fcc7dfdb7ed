"""Write the trained adapter in PEFT's layout."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qtrain.export.card import write_card
from qtrain.files import atomic_directory, write_json


def write_adapter(
    model: PeftModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write adapter_model.safetensors and adapter_config.json, and return what was done, for export.json.

    ``PeftModel.from_pretrained(base, directory)`` reads them; the base is named by ``facts["base_model"]``.
    """
    begin = time.monotonic()
    with atomic_directory(directory) as temporary:
        save_adapter(model, temporary, str(facts.get("base_model", "")))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        result = {
            "format": "adapter",
            "bytes": (temporary / "adapter_model.safetensors").stat().st_size,
            "notes": [],
            "seconds": round(time.monotonic() - begin, 1),
        }
        write_card(temporary, facts, result)
    return result


def save_adapter(model: PeftModel, directory: Path, base: str | None) -> None:
    """adapter_model.safetensors and adapter_config.json, which names ``base`` as what it is put on."""
    # save_embedding_layers asks the hub about the base's vocabulary when it is left on "auto".
    model.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False)
    # safetensors makes files that only their owner reads.
    config = directory / "adapter_config.json"
    (directory / "adapter_model.safetensors").chmod(config.stat().st_mode)
    content = json.loads(config.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = base
    content["inference_mode"] = True
    write_json(config, content)
