"""The files beside the weights: architecture, generation defaults, tokenizer and chat template are the run's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from qtrain.errors import ExportError

OF_THE_FILE = {
    *("_name_or_path", "transformers_version", "quantization_config", "dtype", "torch_dtype"),
    *("architectures", "_from_model_config", "_attn_implementation", "attn_implementation"),
}
"""Keys that say how and where a file was written, or that are looked at by themselves."""
PROBE = "The 3 scales of β are 0.5, −1e-3 and 2^−14;\n\tnaïve 数 \U0001f642 <|im_start|>user\r\n  don't  </s>"
"""Letters of several scripts, digits, white space, contractions, and words that are special tokens of many models."""


def config_problems(directory: Path, config: PretrainedConfig, dtype: torch.dtype) -> Iterator[ExportError]:
    """config.json against the architecture that was trained, key by key."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield ExportError(f"it cannot be read: {' '.join(str(error).split())[:300]}", where=str(path))
        return
    rule = "a consumer builds the architecture that was trained"
    yield from _differences(found.to_dict(), config.to_dict(), str(path), rule)
    if not raw.get("architectures"):
        yield ExportError("architectures is empty", where=str(path), rule="vLLM chooses its model class by it")
    elif config.architectures and raw["architectures"] != config.architectures:
        yield ExportError(
            f"architectures is {raw['architectures']} there, {config.architectures} in the run",
            where=str(path),
            rule=rule,
        )
    stored = raw.get("dtype", raw.get("torch_dtype"))
    if stored != str(dtype).removeprefix("torch."):
        yield ExportError(
            f"dtype is {stored!r} there, {str(dtype).removeprefix('torch.')!r} of the tensors",
            where=str(path),
            rule="consumers load the tensors as what config.json calls them",
        )


def generation_problems(directory: Path, config: GenerationConfig | None) -> Iterator[ExportError]:
    """generation_config.json against the run's."""
    path = directory / "generation_config.json"
    if config is None or not path.is_file():
        if config is not None:
            yield ExportError("it is missing", where=str(path), rule="the defaults of decoding go with the model")
        return
    try:
        found = GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError, TypeError) as error:
        yield ExportError(f"it cannot be read: {error}", where=str(path))
        return
    yield from _differences(
        found.to_dict(), config.to_dict(), str(path), "a consumer decodes as the model's makers meant"
    )


def tokenizer_problems(directory: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[ExportError]:
    """The tokenizer beside the weights against the one of the training: probe text, vocabulary, template."""
    where, rule = str(directory), "the export's tokenizer is that of the training"
    try:
        found = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield ExportError(f"the tokenizer cannot be read: {' '.join(str(error).split())[:300]}", where=where, rule=rule)
        return
    there, own = found(PROBE)["input_ids"], tokenizer(PROBE)["input_ids"]
    if there != own:
        at = next((i for i, (a, b) in enumerate(zip(there, own, strict=False)) if a != b), min(len(there), len(own)))
        yield ExportError(
            f"a probe text has other tokens: from the {at + 1}th on {there[at : at + 3]} there, "
            f"{own[at : at + 3]} in the run",
            where=where,
            rule=rule,
        )
    elif _rules(found) != _rules(tokenizer):
        yield ExportError("the tokenizer has another vocabulary or other merges", where=where, rule=rule)
    if found.special_tokens_map != tokenizer.special_tokens_map:
        yield from _differences(found.special_tokens_map, tokenizer.special_tokens_map, where, rule)
    if found.chat_template != tokenizer.chat_template:
        yield ExportError("it has another chat template", where=where, rule="chats are written as in the training")


def _rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All that a tokenizer goes by; padding and truncation are of its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}


def _differences(found: Mapping[str, Any], own: Mapping[str, Any], where: str, rule: str) -> Iterator[ExportError]:
    one, other = dict(_flat(found)), dict(_flat(own))
    for key in sorted(one.keys() | other.keys()):
        # Files hold null where a key is left out.
        if key.partition(".")[0] not in OF_THE_FILE and one.get(key) != other.get(key):
            yield ExportError(f"{key} is {one.get(key)!r} there, {other.get(key)!r} in the run", where=where, rule=rule)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
