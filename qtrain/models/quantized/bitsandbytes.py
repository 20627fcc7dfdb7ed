"""bitsandbytes directories: NF4, FP4 and LLM.int8() as they were saved, in the layers that freeze_linear makes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedModel

from qtrain.errors import ModelError
from qtrain.models.quantized.layer import linear_of
from qtrain.models.quantized.skeleton import empty_model, load_rest, plain_config
from qtrain.models.quantized.tensors import TensorFiles
from qtrain.modules.frozen_linear import OUTLIER_THRESHOLD, frozen_shell, settle

STATE = "weight.quant_state.bitsandbytes__"
STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def load(
    directory: Path,
    header: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    *,
    compute_dtype: torch.dtype,
    attention: str = "auto",
) -> PreTrainedModel:
    """The model with its codes as stored, frozen, the rest in ``dtype`` (arguments: ``load_codebooks``).

    4 bits: ``weight`` u8 [out * in / 2, 1], ``weight.absmax`` of blocks, ``weight.quant_map``, with double quantization
    ``weight.nested_*``, and ``weight.quant_state.bitsandbytes__nf4`` (or fp4). 8 bits: ``weight`` i8 [out, in] and
    ``SCB`` f32 [out], the largest number of each row.

    Raises:
        ModelError: tensors that contradict one another or the model.
    """
    model = empty_model(plain_config(directory), dtype, attention)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors = TensorFiles(directory)
    four = {key.rpartition(f".{STATE}")[0]: key for key in tensors if f".{STATE}" in key}
    eight = [key.removesuffix(".SCB") for key in tensors if key.endswith(".SCB")]
    if not four and not eight:
        raise ModelError(
            "quant_method='bitsandbytes', and no tensor in its layout",
            where=str(directory),
            rule="4-bit layers have weight.quant_state, 8-bit ones SCB",
            fix="plain weights are quantized on the fly: remove quantization_config, then method.base=nf4 or int8",
        )
    parts = ("weight", "SCB", "weight_format", *(f"weight.{key}" for key in STATISTICS))
    taken = {f"{name}.{part}" for name in (*four, *eight) for part in parts} | set(four.values())
    rest = {name: partial(tensors.get, name) for name in tensors if name not in taken}
    load_rest(model, rest, {f"{name}.weight" for name in (*four, *eight)}, directory, device)
    for name in (*four, *eight):
        linear = linear_of(linears, name)
        if name in four:
            frozen = _four_bits(tensors, name, four[name], linear, compute_dtype, device)
        else:
            threshold = float(header.get("llm_int8_threshold", OUTLIER_THRESHOLD))
            frozen = _eight_bits(tensors, name, linear, compute_dtype, threshold, device)
        model.set_submodule(name, frozen)
    return model


def _four_bits(
    tensors: TensorFiles, name: str, key: str, linear: nn.Linear, compute_dtype: torch.dtype, device: torch.device
) -> nn.Module:
    kind = key.rpartition("__")[2]
    shape, blocks = [linear.out_features, linear.in_features], linear.weight.numel()
    try:
        state = json.loads(bytes(tensors.get(key).tolist()))
        stored, size = list(state["shape"]), int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"it describes no codes: {error!r}", where=f"{tensors.where(key)}: {key}") from None
    if stored != shape or kind not in ("nf4", "fp4"):
        raise ModelError(
            f"{kind} of shape {stored}", where=f"{tensors.where(key)}: {key}", rule=f"the layer is {shape}"
        )
    nested = f"{name}.weight.nested_absmax" in tensors
    blocks = -(-blocks // size)
    tensors.check(f"{name}.weight.absmax", [blocks], [torch.uint8 if nested else torch.float32], f"{shape} by {size}")
    tensors.check(f"{name}.weight.quant_map", [16], [torch.float32], kind)
    weight = tensors.get(f"{name}.weight").contiguous()
    if weight.nbytes != linear.weight.numel() // 2:
        raise ModelError(
            f"{name}.weight of {weight.nbytes} bytes",
            where=tensors.where(f"{name}.weight"),
            rule=f"{shape} in 4 bits takes {linear.weight.numel() // 2}",
        )
    statistics = {f"weight.{part}": tensors.get(f"{name}.weight.{part}") for part in _present(tensors, name)}
    statistics[key.removeprefix(f"{name}.")] = tensors.get(key)
    frozen = frozen_shell(linear, kind, double_quant=nested, compute_dtype=compute_dtype)
    assert isinstance(frozen, bnb.nn.Linear4bit)
    frozen.weight = bnb.nn.Params4bit.from_prequantized(
        weight.view(torch.uint8).reshape(-1, 1),  # bnb_4bit_quant_storage: the same bytes under another name
        statistics,
        requires_grad=False,
        device=device,
        module=frozen,
    )
    return settle(frozen, linear.bias, device)


def _present(tensors: TensorFiles, name: str) -> list[str]:
    return [part for part in STATISTICS if f"{name}.weight.{part}" in tensors]


def _eight_bits(
    tensors: TensorFiles,
    name: str,
    linear: nn.Linear,
    compute_dtype: torch.dtype,
    threshold: float,
    device: torch.device,
) -> nn.Module:
    weight = f"a weight [{linear.out_features}, {linear.in_features}] in 8 bits"
    tensors.check(f"{name}.weight", [linear.out_features, linear.in_features], [torch.int8], weight)
    tensors.check(f"{name}.SCB", [linear.out_features], [torch.float32], weight)
    key = f"{name}.weight_format"
    if key in tensors and int(tensors.get(key)) != 0:
        raise ModelError(
            f"weight_format={int(tensors.get(key))}",
            where=f"{tensors.where(key)}: {key}",
            rule="codes lie row by row (0); others were an early kernel's order",
            fix="save it again with bitsandbytes 0.45 or later",
        )
    frozen = frozen_shell(linear, "int8", double_quant=False, compute_dtype=compute_dtype, threshold=threshold)
    codes = tensors.get(f"{name}.weight")
    frozen.weight = bnb.nn.Int8Params(
        codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=tensors.scale(f"{name}.SCB")
    )
    return settle(frozen, linear.bias, device)
