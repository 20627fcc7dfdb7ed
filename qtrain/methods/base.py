"""The weights that a method begins with: 16-bit ones, or the codes that model.path holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from qtrain.errors import ModelError
from qtrain.methods.config import KEPT, MethodSection
from qtrain.methods.method import Method
from qtrain.models.config import ModelSection
from qtrain.models.load import load_model, unreadable
from qtrain.models.packed import load_packed
from qtrain.models.quantized.checkpoint import load_codebooks
from qtrain.models.quantized.header import header_of, quant_method
from qtrain.models.quantized.registry import CODEBOOKS
from qtrain.models.source import ModelSource, find_model
from qtrain.models.stored import stored_directory
from qtrain.models.unread import load_unread


@dataclass(frozen=True)
class Base:
    """A model for ``Method.prepare``.

    Attributes:
        loading: how it comes into memory, in words; None where there was no choice.
    """

    model: PreTrainedModel
    loading: str | None


def load_for(
    method: Method[Any],
    section: ModelSection,
    dtype: torch.dtype,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    whole: str | None = None,
) -> Base:
    """``load_base``, but where ``method`` quantizes layers one by one each is read from its file when it is its turn.

    Then no more than one of them is in memory in 16 bits, and everything else is on ``device``.

    Args:
        whole: why all 16-bit weights are needed together; None: only as far as the method needs them.

    Raises:
        ModelError: as ``load_base``.
    """
    loading = None
    if method.quantizes_alone and not method.options.keeps_codes:
        if (found := _codes_of(source := find_model(section), section)) is not None:
            raise _codes_in_the_way(found, method.options, source)
        unread = whole or load_unread(section, dtype, device, method.quantized_alone)
        if isinstance(unread, PreTrainedModel):
            return Base(unread, "each layer quantized as it was read")
        loading = f"whole, then quantized: {unread}"
    return Base(load_base(section, method.options, dtype, compute_dtype=compute_dtype, device=device), loading)


def load_base(
    section: ModelSection,
    method: MethodSection,
    dtype: torch.dtype,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """``model.path`` with 16-bit weights, or with its codes where ``method`` keeps them.

    Args:
        dtype: of what is not quantized.
        compute_dtype: of products with weights that a library dequantizes (bitsandbytes, AQLM).
        device: where those will be; everything else is loaded to the CPU.

    Raises:
        ModelError: no codes to keep, or codes in the place of 16-bit weights: nothing is unpacked unasked.
    """
    source = find_model(section)
    found = _codes_of(source, section)
    if not method.keeps_codes:
        if found is not None:
            raise _codes_in_the_way(found, method, source)
        return load_model(section, dtype)
    if found is None:
        raise ModelError(
            f"method.{method.codes_key}={KEPT} keeps the codes of a quantized checkpoint, and model.path holds "
            "16-bit weights",
            where=source.location,
            rule="codes are kept where there are any",
            fix="a GPTQ, AWQ or compressed-tensors directory as model.path, or "
            + ("method.base=nf4" if method.takes_codebooks else "method.init=gptq"),
        )
    directory = stored_directory(section)
    assert directory is not None  # a GGUF file has no such codes
    if method.takes_codebooks and found in CODEBOOKS.names():
        return load_codebooks(directory, dtype, device, compute_dtype=compute_dtype, attention=section.attention)
    return load_packed(directory, dtype, attention=section.attention)


def _codes_of(source: ModelSource, section: ModelSection) -> str | None:
    """The method that quantized the weights, None where they are plain; of a hub id its config.json says it."""
    if source.kind == "gguf":
        return None
    if source.kind == "directory":
        return quant_method(Path(source.location))
    try:
        config, _ = PretrainedConfig.get_config_dict(source.location, revision=section.revision or "main")
    except (OSError, ValueError) as error:
        raise unreadable("model", source, error) from None
    header = header_of(config, source.location)
    return None if header is None else str(header["quant_method"])


def _codes_in_the_way(found: str, method: MethodSection, source: ModelSource) -> ModelError:
    over_codes = "method.name=qlora method.base=checkpoint trains adapters over them"
    if method.codes_key is None:
        wants = f"method.name={method.name} trains 16-bit weights"
        fix = f"the model that it was made from; {over_codes}"
        fix += "" if found in CODEBOOKS.names() else ", method.name=peqa method.init=checkpoint their scales"
    else:
        value = getattr(method, method.codes_key)
        wants = f"method.{method.codes_key}={value} " + (
            "keeps 16-bit weights" if value == "none" else "chooses codes of 16-bit weights"
        )
        kept = method.takes_codebooks or found not in CODEBOOKS.names()
        fix = f"method.{method.codes_key}={KEPT} keeps them" if kept else over_codes
    return ModelError(
        f"model.path holds {found} codes, and {wants}",
        where=source.location,
        rule="codes are neither unpacked unasked nor quantized a second time",
        fix=fix,
    )
