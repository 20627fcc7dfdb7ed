"""Models and tokenizers through transformers, from safetensors and GGUF alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qtrain.errors import ModelError
from qtrain.models.config import ModelSection
from qtrain.models.gguf_header import check_gguf
from qtrain.models.intact import check_directory, check_sizes
from qtrain.models.quantized.header import read_header
from qtrain.models.source import ModelSource, find_model


def load_tokenizer(section: ModelSection, source: ModelSource | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token (the end-of-text token where the model has none of its own)."""
    source = source or find_model(section)
    if source.kind == "directory":
        read_header(Path(source.location))  # a configuration that is none would be told as a tokenizer's
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            **source.loader_arguments, revision=_revision(section), trust_remote_code=section.trust_remote_code
        )
    except Exception as error:  # which code reads a tokenizer is in its own files: it raises anything
        raise unreadable("tokenizer", source, error) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(section: ModelSection, dtype: torch.dtype, *, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The causal language model of ``model.path`` with weights in ``dtype``, in eval mode.

    Raises:
        ModelError: the files are no model, are damaged, or need code that was not asked for.
    """
    source = find_model(section)
    check_files(source, trusted=section.trust_remote_code)
    attention = {} if section.attention == "auto" else {"attn_implementation": section.attention}
    try:
        with _without_bars(section):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source.loader_arguments,
                **attention,
                **_unpacking(section),
                dtype=dtype,
                revision=_revision(section),
                trust_remote_code=section.trust_remote_code,
                use_safetensors=None if source.kind == "gguf" else True,
                output_loading_info=True,
            )
    except Exception as error:  # which code makes a model is in its config.json: it raises anything
        raise unreadable("model", source, error) from None
    model: PreTrainedModel
    model, found = loaded
    _check_complete(found, source)
    if source.kind == "gguf":
        model = _plain(model)
    with _without_bars(section):
        model.to(device)  # type: ignore[arg-type]  # the decorator on it loses `self`
    model.eval()
    return model


def check_files(source: ModelSource, *, trusted: bool = False) -> None:
    """What can be told of a model's files from their headers.

    Args:
        trusted: the model may bring code, which alone knows its architecture.

    Raises:
        ModelError: they are not those of a whole model, or not its own.
    """
    if source.kind == "gguf":
        check_gguf(Path(source.location))
    elif source.kind == "directory":
        check_directory(directory := Path(source.location))
        if not trusted and read_header(directory) is None:
            check_sizes(directory)


def _check_complete(found: Mapping[str, Any], source: ModelSource) -> None:
    """transformers gives a parameter that is in no file random numbers."""
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""),
            where=source.location,
            rule="every parameter is in the files, or tied to one that is",
            fix="download it again, whole; or check the sizes in config.json",
        )


def is_quantized_export(section: ModelSection) -> bool:
    """Whether ``model.path`` is a directory whose weights transformers itself unpacks."""
    source = find_model(section)
    return source.kind == "directory" and '"quantization_config"' in (Path(source.location) / "config.json").read_text()


def _unpacking(section: ModelSection) -> dict[str, Any]:
    """compressed-tensors 0.20 under transformers 5.23 loads zero points only where it unpacks weights at once."""
    if not is_quantized_export(section):
        return {}
    path = Path(find_model(section).location) / "config.json"
    header = json.loads(path.read_text(encoding="utf-8"))["quantization_config"]
    weights = [group.get("weights") or {} for group in header.get("config_groups", {}).values()]
    asymmetric = any(not weight.get("symmetric", True) for weight in weights)
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)} if asymmetric else {}


def _without_bars(section: ModelSection) -> AbstractContextManager[object]:
    """compressed-tensors draws progress bars that no setting reaches; what goes wrong comes as an exception."""
    return redirect_stderr(StringIO()) if is_quantized_export(section) else nullcontext()


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights without the marks of a GGUF load, with which saving raises (transformers 5.23)."""
    config = model.config
    del config.quantization_config
    with torch.device("meta"):
        plain: PreTrainedModel = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        plain.get_submodule(owner).register_buffer(attribute, buffer, persistent=False)
    plain.generation_config = model.generation_config
    plain.tie_weights()
    return plain


def _revision(section: ModelSection) -> str:
    return section.revision or "main"


def unreadable(what: str, source: ModelSource, error: Exception) -> ModelError:
    """What a library said of a model's files, with the way out."""
    reason = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError)):
        reason = f"{type(error).__name__}: {reason}"
    fix = "download it again, whole; or check its config.json against `pip show transformers`"
    if "trust_remote_code" in reason:
        fix = "read that code, then model.trust_remote_code=true"
    elif source.kind == "hub":
        fix = "check the id, the network and the login (hf auth login); a directory works without either"
    return ModelError(
        f"{what} of {source.location} cannot be loaded: {reason[:400]}",
        rule="a model is config.json, safetensors and a tokenizer (or one .gguf file) that transformers loads",
        fix=fix,
    )
