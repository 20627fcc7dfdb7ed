"""Read a packed directory back to codes and scales, with a reader of our own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qtrain.errors import ExportError
from qtrain.modules.record import LinearRecord
from qtrain.numerics.packing import unpack
from qtrain.numerics.spec import QuantSpec, ScaleDtype

SPEC_NAMES: dict[torch.dtype, ScaleDtype] = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def read_records(directory: Path) -> Iterator[tuple[str, LinearRecord]]:
    """Every quantized layer of a pack-quantized directory, by module name; one layer is read at a time.

    Raises:
        ExportError: another layout, or tensors that contradict one another.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    if config.get("format") != "pack-quantized":
        raise ExportError(
            f"quantization_config.format={config.get('format')!r}",
            where=str(directory),
            rule="only pack-quantized compressed-tensors is read back",
        )
    schemes = {target: group["weights"] for group in config["config_groups"].values() for target in group["targets"]}
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            where.update(dict.fromkeys(file.keys(), file))
        for key in where:
            if key.endswith(".weight_packed"):
                name = key.removesuffix(".weight_packed")
                words, scale, shape = (
                    where[f"{name}.{part}"].get_tensor(f"{name}.{part}")
                    for part in ("weight_packed", "weight_scale", "weight_shape")
                )
                yield name, _record(name, words, scale, shape.tolist(), schemes.get(name) or schemes["Linear"])


def _record(name: str, words: Tensor, scale: Tensor, shape: list[int], scheme: dict[str, Any]) -> LinearRecord:
    rows, columns = shape
    size = scheme["group_size"] if scheme["strategy"] == "group" else None
    bits = scheme["num_bits"]
    expected = {"weight_packed": [rows, -(-columns * bits // 32)], "weight_scale": [rows, columns // (size or columns)]}
    for part, tensor in (("weight_packed", words), ("weight_scale", scale)):
        if list(tensor.shape) != expected[part]:
            raise ExportError(
                f"{part} of shape {list(tensor.shape)}",
                where=name,
                rule=f"a weight {shape} in {bits} bits with group_size={size} has {expected[part]}",
            )
    spec = QuantSpec(
        format=f"int{bits}",
        granularity="per_group" if size else "per_channel",
        group_size=size,
        full_range=True,
        scale_dtype=SPEC_NAMES[scale.dtype],
    )
    return LinearRecord(unpack(words, bits, columns), scale, None, spec)
