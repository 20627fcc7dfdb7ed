"""Read an exported directory back to codes and scales, with a reader of our own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qtrain.errors import ExportError
from qtrain.modules.record import LinearRecord
from qtrain.numerics.packing import unpack
from qtrain.numerics.spec import Granularity, QuantSpec, ScaleDtype

SPEC_NAMES: dict[torch.dtype, ScaleDtype] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def read_records(directory: Path) -> Iterator[tuple[str, LinearRecord]]:
    """Every quantized layer of a compressed-tensors directory, by module name; one is read at a time.

    Raises:
        ExportError: another layout, or tensors that contradict one another.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    packed = config.get("format") == "pack-quantized"
    if not packed and config.get("format") not in ("int-quantized", "float-quantized"):
        raise ExportError(
            f"quantization_config.format={config.get('format')!r}",
            where=str(directory),
            rule="only pack-, int- and float-quantized compressed-tensors are read back",
        )
    schemes = {target: group["weights"] for group in config["config_groups"].values() for target in group["targets"]}
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            files.update(dict.fromkeys(file.keys(), file))

        def read(name: str, part: str) -> Tensor:
            tensor: Tensor = files[f"{name}.{part}"].get_tensor(f"{name}.{part}")
            return tensor

        for key in files:
            name, _, part = key.rpartition(".")
            if part != "weight_scale":
                continue
            scheme = schemes.get(name) or schemes["Linear"]
            if packed:
                words, shape = read(name, "weight_packed"), read(name, "weight_shape")
                codes = _unpacked(name, words, shape, scheme["num_bits"])
            else:
                codes = read(name, "weight")
            record = _record(name, codes, _narrowed(read(name, part)), scheme)
            if not scheme["symmetric"]:
                points = unpack(read(name, "weight_zero_point").t(), scheme["num_bits"], len(codes)).t()
                _check_shape(name, "weight_zero_point", points, list(record.scale.shape), "unpacked")
                record = replace(record, zero_point=points.contiguous())
            yield name, record


def _narrowed(scale: Tensor) -> Tensor:
    """Scales that fill no more than 16 bits, in those; beside zero points they may be stored in fp32."""
    return next((scale.to(dtype) for dtype in SPEC_NAMES if torch.equal(scale.to(dtype).to(scale.dtype), scale)), scale)


def _unpacked(name: str, words: Tensor, shape: Tensor, bits: int) -> Tensor:
    rows, columns = shape.tolist()
    expected = [rows, -(-columns * bits // 32)]
    _check_shape(name, "weight_packed", words, expected, f"[{rows}, {columns}] in {bits} bits")
    return unpack(words, bits, columns)


def _record(name: str, codes: Tensor, scale: Tensor, scheme: dict[str, Any]) -> LinearRecord:
    rows, columns = codes.shape
    size, bits = scheme["group_size"] if scheme["strategy"] == "group" else None, scheme["num_bits"]
    whole = f"[{rows}, {columns}] with group_size={size}"
    scale = scale.reshape(1, 1) if scheme["strategy"] == "tensor" else scale
    groups = [1, 1] if scheme["strategy"] == "tensor" else [rows, columns // (size or columns)]
    _check_shape(name, "weight_scale", scale, groups, whole)
    if scheme["type"] == "float":
        granularity: Granularity = "per_tensor" if scheme["strategy"] == "tensor" else "per_channel"
        spec = QuantSpec("fp8_e4m3", True, granularity, None, scale_dtype=SPEC_NAMES[scale.dtype])
        return LinearRecord(codes, scale, None, spec)
    spec = QuantSpec(
        format=f"int{bits}",
        symmetric=scheme["symmetric"],
        granularity="per_group" if size else "per_channel",
        group_size=size,
        full_range=scheme["symmetric"],
        scale_dtype=SPEC_NAMES[scale.dtype],
    )
    if codes.dtype != torch.int8 or int(codes.min()) < spec.quant_min or int(codes.max()) > spec.quant_max:
        raise ExportError(
            f"codes from {int(codes.min())} to {int(codes.max())} in {codes.dtype}",
            where=name,
            rule=f"int{bits} codes in torch.int8 lie within {spec.quant_min} .. {spec.quant_max}",
        )
    return LinearRecord(codes, scale, None, spec)


def _check_shape(name: str, part: str, tensor: Tensor, expected: list[int], weight: str) -> None:
    if list(tensor.shape) != expected:
        raise ExportError(f"{part} of shape {list(tensor.shape)}", where=name, rule=f"a weight {weight} has {expected}")
