"""What a directory says of its quantization, before any of its tensors is looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtrain.errors import ModelError

BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of AutoGPTQ and AutoAWQ, from before config.json held the description, and what they describe."""
OBJECT = "a model's configuration is a JSON object"
AGAIN = "download the file again, whole"
DESCRIPTION = "it describes how the weights are stored, as a JSON object"
PLAIN = "remove quantization_config from config.json, if the weights are plain"


def read_header(directory: Path) -> dict[str, Any] | None:
    """``quantization_config`` of config.json (``compression_config`` in early compressed-tensors), with its method.

    None where the weights are plain.

    Raises:
        ModelError: a file that is no JSON, or a description without a method.
    """
    found = header_of(json_object(directory / "config.json"), str(directory / "config.json"))
    if found is None:
        for name, method in BESIDE.items():
            if (directory / name).is_file():
                return {**json_object(directory / name), "quant_method": method}
    return found


def header_of(config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """``read_header`` of the content of a config.json.

    Args:
        where: it was read, for errors.
    """
    header = config.get("quantization_config") or config.get("compression_config")
    if header is None:
        return None
    if not isinstance(header, dict):
        raise ModelError(f"quantization_config={header!r} is no object", where=where, rule=DESCRIPTION, fix=PLAIN)
    if "quant_method" not in header:
        bits = [key for key in ("load_in_4bit", "load_in_8bit") if header.get(key)]
        if not bits:
            raise ModelError(
                "quantization_config has no quant_method",
                where=where,
                rule="it names how the weights are stored: gptq, awq, compressed-tensors, hqq, bitsandbytes, ...",
                fix=PLAIN,
            )
        return {**header, "quant_method": "bitsandbytes"}  # as its first versions wrote it
    return {**header}


def quant_method(directory: Path) -> str | None:
    """The method that quantized the weights in ``directory``, None where they are plain."""
    header = read_header(directory)
    return None if header is None else str(header["quant_method"])


def json_object(path: Path) -> dict[str, Any]:
    """The content of a file with one JSON object.

    Raises:
        ModelError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"it cannot be read: {error}", where=str(path), rule=OBJECT, fix=AGAIN) from None
    if not isinstance(content, dict):
        raise ModelError("it holds no object", where=str(path), rule=OBJECT, fix=AGAIN)
    return content
