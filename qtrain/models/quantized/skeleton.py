"""A model without its quantized weights: everything else loaded, those linears on the meta device."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from accelerate.big_modeling import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from qtrain.errors import ModelError

FORMER_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$")
"""What old checkpoints hold and models compute themselves by now."""


def plain_config(directory: Path) -> PretrainedConfig:
    """The architecture, without a word of quantization.

    Raises:
        ModelError: config.json is none, or of an architecture that transformers does not know.
    """
    try:
        # Left open, transformers asks the terminal whether to run the code that comes with a model.
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # which code reads it is in the file itself: it raises anything
        reason = " ".join(str(error).split())
        raise ModelError(
            f"it is no configuration of a model: {reason[:400]}",
            where=str(directory / "config.json"),
            rule="an architecture that transformers knows, in sizes that fit together",
            fix="read that code, then model.trust_remote_code=true"
            if "trust_remote_code" in reason
            else "download the file again, or a newer transformers",
        ) from None
    for key in ("quantization_config", "compression_config"):
        if hasattr(config, key):
            delattr(config, key)
    return config


def empty_model(config: PretrainedConfig, dtype: torch.dtype, attention: str = "auto") -> PreTrainedModel:
    """The architecture in eval mode: parameters on the meta device, computed buffers (RoPE's frequencies) real."""
    chosen = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False, **chosen
            )
    except Exception as error:  # sizes that fit no layer raise anything
        raise ModelError(
            f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
            where=f"model_type {config.model_type}",
            rule="an architecture that transformers knows, in sizes that fit together",
            fix="check config.json, or model.attention=auto",
        ) from None
    model.eval()
    return model


def load_rest(
    model: PreTrainedModel,
    tensors: Mapping[str, Callable[[], Tensor]],
    absent: Collection[str],
    directory: Path,
    device: torch.device,
) -> None:
    """Fill an empty model, in place, and tie what is tied.

    Args:
        tensors: plain ones, by the names of the model's parameters.
        absent: names of parameters that stay on the meta device.

    Raises:
        ModelError: a tensor too many, one too few, or of another shape.
    """
    ignored = [*FORMER_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ())]
    in_fp32 = [re.compile(rf"(^|\.){re.escape(key)}(\.|$)") for key in model._keep_in_fp32_modules_strict or ()]
    loaded = set(absent)
    for name, load in tensors.items():
        owner, attribute = _owner(model, name)
        if owner is None:
            if any(re.search(pattern, name) for pattern in ignored) or _is_empty_bias(model, name, load):
                continue
            raise ModelError(
                f"{name} belongs to no part of {type(model).__name__}",
                where=str(directory),
                rule="tensors are named as the model's parameters",
                fix="check num_hidden_layers and architectures in config.json",
            )
        old = getattr(owner, attribute)
        value = load()
        if value.shape != old.shape:
            raise ModelError(
                f"{name} of shape {list(value.shape)}",
                where=str(directory),
                rule=f"config.json makes it {list(old.shape)}",
            )
        if value.is_floating_point():
            dtype = torch.float32 if any(pattern.search(name) for pattern in in_fp32) else old.dtype
            value = value.to(device, dtype)
        value = value.to(device)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=value.is_floating_point())
        setattr(owner, attribute, value)
        loaded.add(name)
    missing = {name for name, _ in model.named_parameters(remove_duplicate=False)} - loaded
    if missing:
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    lacking = sorted(name for name, p in model.named_parameters() if p.is_meta and name not in absent)
    if lacking:
        raise ModelError(
            f"{lacking[0]} is missing" + (f", and {len(lacking) - 1} more" if len(lacking) > 1 else ""),
            where=str(directory),
            rule="every parameter is in the files, or tied to one that is",
            fix="download the directory again",
        )
    settle_buffers(model, device)
    restore_generation(model, directory)


def settle_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Bring buffers to ``device``, what a model computes itself as ``from_pretrained`` has it: in fp32 arithmetic.

    Built in bf16, GPT-J's table of positions would be one of bf16's sines.
    """
    exact: dict[str, Tensor] = {}
    if model.dtype != torch.float32:
        exact = dict(empty_model(copy.deepcopy(model.config), torch.float32).named_buffers())
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if name in module._non_persistent_buffers_set:
                buffer = exact.get(f"{path}.{name}" if path else name, buffer).to(buffer.dtype)
            module._buffers[name] = buffer.to(device)


def restore_generation(model: PreTrainedModel, directory: Path) -> None:
    """Give the model the defaults of generation_config.json, where there is one.

    Raises:
        ModelError: it cannot be read.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"it cannot be read: {' '.join(str(error).split())[:200]}",
            where=str(path),
            rule="defaults of `generate` as a JSON object",
            fix="download it again, or remove it",
        ) from None


def _owner(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The module that has a parameter or a saved buffer of that name."""
    path, _, attribute = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return None, attribute
    saved = owner._buffers.keys() - owner._non_persistent_buffers_set
    known = owner._parameters.get(attribute) is not None or attribute in saved
    return (owner if known else None), attribute


def _is_empty_bias(model: nn.Module, name: str, load: Callable[[], Tensor]) -> bool:
    """AutoGPTQ gave each layer a bias, zeros where the model has none."""
    path, _, attribute = name.rpartition(".")
    if attribute != "bias":
        return False
    try:
        return isinstance(model.get_submodule(path), nn.Linear) and not bool(load().any())
    except AttributeError:
        return False
