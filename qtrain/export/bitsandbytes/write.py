"""Write a base in bitsandbytes' codes, and its adapter beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qtrain.export.adapter.write import save_adapter
from qtrain.export.bitsandbytes.config import BitsAndBytesOptions
from qtrain.export.bitsandbytes.header import Scheme, quantization_config, shared_scheme
from qtrain.export.bitsandbytes.layer import frozen_layers, quantized_anew, tensors_of
from qtrain.export.bitsandbytes.load import ADAPTER
from qtrain.export.card import write_card
from qtrain.export.companions import write_companions
from qtrain.export.partial import partial_export
from qtrain.export.shards import ShardWriter
from qtrain.export.sizes import parse_size
from qtrain.export.writer import Progress
from qtrain.modules.deployed import DeployedModel, DeployedTensor
from qtrain.modules.frozen_linear import frozen_kind
from qtrain.ptq.activation_stats import Calibration


def write(
    model: DeployedModel,
    options: BitsAndBytesOptions,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    facts: Mapping[str, Any],
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    resume: str | None = None,
) -> dict[str, Any]:
    """Write ``directory`` and return what was done, for export.json (arguments: ``qtrain.export.writer``).

    The base's bytes as they are on the device; nothing is dequantized, unless ``options.quantize`` asks for it.

    Raises:
        ExportError: codes that have no place here, or would be quantized again unasked.
    """
    begin = time.monotonic()
    tensors = list(model.tensors())
    options.check_trained((tensor.name, tensor.spec, tensor.activation) for tensor in tensors if tensor.linear)
    merged = options.quantize != "none"
    frozen = {} if model.adapted is None else frozen_layers(model.adapted.get_base_model())
    options.check_kinds(sorted({str(frozen_kind(layer)) for layer in frozen.values()}))
    layers: dict[str, Callable[[], nn.Module]]
    if merged:
        scheme = _scheme(model, options, frozen)
        layers = {
            tensor.name.removesuffix(".weight"): partial(
                quantized_anew,
                tensor,
                scheme.kind,
                double_quant=scheme.double_quant,
                compute_dtype=scheme.compute_dtype,
                dtype=model.dtype,
            )
            for tensor in tensors
            if tensor.linear
        }
    else:
        scheme = shared_scheme(frozen.items())
        layers = {name: partial(frozen.__getitem__, name) for name in frozen}
    coded = [tensor for tensor in tensors if _layer_of(tensor) in layers]
    unquantized = [tensor.name for tensor in tensors if _layer_of(tensor) not in layers]
    with partial_export(directory, resume) as unfinished:
        with ShardWriter(unfinished.files, parse_size(options.max_shard_size), journal=unfinished.journal) as shards:
            left = [tensor for tensor in tensors if not shards.holds(tensor.name)]
            for tensor in progress(left, len(left)) if progress else left:
                name = _layer_of(tensor)
                if name in layers:
                    shards.add_all(tensor.name, tensors_of(name, layers[name]()))
                else:
                    shards.add(tensor.name, tensor.value().to(model.dtype))
        write_companions(model, unfinished.files, tokenizer, quantization_config(scheme, model.config, layers))
        weights = sum(torch.Size(tensor.shape).numel() for tensor in coded)
        result: dict[str, Any] = {
            "format": "bitsandbytes",
            "kind": scheme.kind,
            "double_quant": scheme.double_quant,
            "bits": 8 if scheme.kind == "int8" else 4,
            "bits_per_quantized_weight": round(8 * shards.bytes_of(unquantized) / weights, 4),
            "bytes": shards.total_bytes,
            "quantized_layers": len(layers),
            "codes": "lossy" if merged else "as trained",
            "vllm": False,
            "dtype": str(model.dtype).removeprefix("torch."),
            "notes": list(model.notes) if merged else [],  # they are on merging
        }
        if not merged:
            assert model.adapted is not None
            folder = unfinished.files / ADAPTER
            folder.mkdir()
            # Its base lies beside it, and no path says so: by a hub id it would be put on weights it never saw.
            save_adapter(model.adapted, folder, None)
            result["adapter"] = ADAPTER
            result["bytes"] += (folder / "adapter_model.safetensors").stat().st_size
        result["seconds"] = round(time.monotonic() - begin, 1)
        write_card(unfinished.files, facts, result)
    return result


def _layer_of(tensor: DeployedTensor) -> str:
    """The layer whose weight a tensor is; no layer's name for others."""
    return tensor.name.removesuffix(".weight") if tensor.name.endswith(".weight") else ""


def _scheme(model: DeployedModel, options: BitsAndBytesOptions, frozen: Mapping[str, nn.Module]) -> Scheme:
    """What a merged model is quantized to, as near to its base as the options leave."""
    own = [Scheme.of(layer) for layer in frozen.values() if frozen_kind(layer) in ("nf4", "fp4")]
    if options.quantize == "int8":
        return Scheme("int8")
    compute = own[0].compute_dtype if own else model.dtype
    return Scheme(options.quantize, double_quant=own[0].double_quant if own else True, compute_dtype=compute)
