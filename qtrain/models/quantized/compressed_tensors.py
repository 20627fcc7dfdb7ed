"""compressed-tensors directories: packed words or bytes, each layer by the scheme whose target it matches."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import match_targets
from pydantic import ValidationError
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.models.quantized.layer import (
    SCALE_NAMES,
    InputScheme,
    QuantizedLayer,
    Reading,
    groups_of,
    linear_of,
    signed,
    weight_spec,
)
from qtrain.models.quantized.tensors import FLOATS, TensorFiles
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import QParams
from qtrain.numerics.packing import unpack_rows, words_of
from qtrain.numerics.spec import Granularity, QuantSpec

PACKED, BYTES, FLOATING = "pack-quantized", "int-quantized", "float-quantized"
PARTS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
INPUT_PARTS = ("input_scale", "input_zero_point")
CACHE_PARTS = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")
FIX = "start from the 16-bit checkpoint it was made from"


def read(tensors: TensorFiles, header: Mapping[str, Any], linears: Mapping[str, nn.Linear]) -> Reading:
    """Layers with ``weight_packed`` int32 [out, in * b / 32] or ``weight`` int8 [out, in], and ``weight_scale``.

    w = (q - z) s; ``weight_zero_point`` is packed along the outputs [out * b / 32, groups], or int8 as it is.

    Raises:
        ModelError: another format or scheme, tensors that contradict the header.
    """
    schemes = _schemes(header, tensors)
    layers, taken = {}, set[str]()
    for name in (key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")):
        linear = linear_of(linears, name)
        scheme = _scheme_of(name, linear, schemes, tensors)
        layers[name] = _layer(tensors, name, linear, scheme)
        taken |= {f"{name}.{part}" for part in (*PARTS, *INPUT_PARTS)} & set(tensors)
    for key in tensors:
        if key.endswith(".weight_packed") and key not in taken:
            tensors.check(key.replace(".weight_packed", ".weight_scale"), [], FLOATS, "a packed weight")
    cache = {key for key in tensors if key.rpartition(".")[2] in CACHE_PARTS}
    notes = ("the scales of a quantized KV cache are not used",) if cache or header.get("kv_cache_scheme") else ()
    was = "compressed-tensors (" + ", ".join(sorted({_format(scheme, header) for scheme in schemes.values()})) + ")"
    return Reading(layers, frozenset(taken | cache), was, notes)


def _schemes(header: Mapping[str, Any], tensors: TensorFiles) -> dict[str, QuantizationScheme]:
    """Targets and their schemes."""
    where = f"{tensors.directory}: quantization_config"
    for key, rule in (
        ("transform_config", "weights that a rotation belongs to are not read"),
        ("sparsity_config", "sparse weights are not read"),
    ):
        content = header.get(key) or {}
        if content.get("config_groups") or content.get("format", "dense") != "dense":
            raise ModelError(f"{key} is set", where=where, rule=rule, fix=FIX)
    try:
        config = QuantizationConfig.model_validate(dict(header))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ModelError(f"{key}: {first['msg']}", where=where, rule="as compressed-tensors has it", fix=FIX) from None
    schemes = {}
    for scheme in config.config_groups.values():
        assert isinstance(scheme, QuantizationScheme)  # names of presets are resolved by the validation
        layout = _format(scheme, header)
        kind = "float" if layout == FLOATING else "int"
        if layout not in (PACKED, BYTES, FLOATING) or (scheme.weights is not None and scheme.weights.type != kind):
            rule = f"{PACKED}, {BYTES} and {FLOATING} (of 8 bits) are read"
            raise ModelError(f"format={layout!r}", where=where, rule=rule, fix=FIX)
        if scheme.output_activations is not None:
            raise ModelError(
                "output_activations is set", where=where, rule="outputs of layers stay in 16 bits", fix=FIX
            )
        schemes.update(dict.fromkeys(scheme.targets, scheme))
    return schemes


def _format(scheme: QuantizationScheme, header: Mapping[str, Any]) -> str:
    layout = scheme.format or header.get("format")
    return str(getattr(layout, "value", layout))


def _scheme_of(
    name: str, linear: nn.Linear, schemes: Mapping[str, QuantizationScheme], tensors: TensorFiles
) -> QuantizationScheme:
    found = match_targets(name, linear, list(schemes))
    if not found or schemes[found[0]].weights is None:
        raise ModelError(
            f"{name} is quantized, and no config group says how",
            where=str(tensors.directory),
            rule="a group's targets name the layer, match it with re:, or name its class; there is: "
            + ", ".join(schemes),
            fix=FIX,
        )
    return schemes[found[0]]


def _layer(tensors: TensorFiles, name: str, linear: nn.Linear, scheme: QuantizationScheme) -> QuantizedLayer:
    args = scheme.weights
    assert args is not None  # _scheme_of
    k, n, bits = linear.in_features, linear.out_features, args.num_bits
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if args.type == "float":
        return _float_layer(tensors, name, linear, scheme, strategy)
    if strategy not in ("tensor", "channel", "group") or bits not in range(2, 9):
        raise ModelError(
            f"strategy={strategy!r} with num_bits={bits}",
            where=f"{tensors.directory}: {name}",
            rule="tensor, channel and group with 2 to 8 bits are read",
            fix=FIX,
        )
    group_size = args.group_size if strategy == "group" else None
    groups = groups_of(name, k, group_size)
    weight = f"a weight [{n}, {k}] in {bits} bits, {strategy}" + (f" of {group_size}" if group_size else "")
    packed, apart = f"{name}.weight_packed" in tensors, False
    if packed:
        tensors.check(f"{name}.weight_shape", [2], [torch.int64, torch.int32], "a packed weight")
        if tensors.get(f"{name}.weight_shape").tolist() != [n, k]:
            raise ModelError(
                f"weight_shape={tensors.get(f'{name}.weight_shape').tolist()}",
                where=f"{tensors.where(f'{name}.weight_shape')}: {name}",
                rule=f"this layer of the model is [{n}, {k}]",
            )
        apart = _is_apart(tensors.shape(f"{name}.weight_packed"), k, bits)
        tensors.check(f"{name}.weight_packed", [n, _words(k, bits, apart)], [torch.int32], weight)
    else:
        tensors.check(f"{name}.weight", [n, k], [torch.int8], weight)
    key = f"{name}.weight_scale"
    tensors.check(key, [1] if strategy == "tensor" and tensors.shape(key) == [1] else [n, groups], FLOATS, weight)
    packed_points = False
    if not args.symmetric:
        key = f"{name}.weight_zero_point"
        packed_points = tensors.dtype(key) == torch.int32  # before compressed-tensors packed them they were int8
        points = [_words(n, bits, apart), groups] if packed_points else tensors.shape(f"{name}.weight_scale")
        tensors.check(key, points, [torch.int32, torch.int8], weight)
    if f"{name}.weight_g_idx" in tensors:
        _check_order(tensors, f"{name}.weight_g_idx", k, group_size or k)
    scale_dtype = tensors.dtype(f"{name}.weight_scale")
    assert scale_dtype is not None  # checked
    spec = weight_spec(bits, group_size, symmetric=args.symmetric, scale_dtype=scale_dtype)
    load = partial(_record, tensors, name, spec, [n, k], _Layout(packed, packed_points, apart))
    return QuantizedLayer(spec, load, _inputs(tensors, name, scheme.input_activations))


def _float_layer(
    tensors: TensorFiles, name: str, linear: nn.Linear, scheme: QuantizationScheme, strategy: str
) -> QuantizedLayer:
    """``weight`` float8_e4m3fn [out, in] and ``weight_scale`` [out, 1] or [1]."""
    args, shape = scheme.weights, [linear.out_features, linear.in_features]
    assert args is not None  # _scheme_of
    if strategy not in ("tensor", "channel") or args.num_bits != 8 or not args.symmetric:
        raise ModelError(
            f"strategy={strategy!r} with {args.num_bits}-bit floats",
            where=f"{tensors.directory}: {name}",
            rule="e4m3 with a scale a row or a tensor is read",
            fix=FIX,
        )
    weight = f"a weight {shape} in fp8, {strategy}"
    tensors.check(f"{name}.weight", shape, [torch.float8_e4m3fn], weight)
    tensors.check(f"{name}.weight_scale", [1] if strategy == "tensor" else [shape[0], 1], FLOATS, weight)
    scale_dtype = tensors.dtype(f"{name}.weight_scale")
    assert scale_dtype is not None  # checked
    granularity: Granularity = "per_tensor" if strategy == "tensor" else "per_channel"
    spec = QuantSpec("fp8_e4m3", True, granularity, None, scale_dtype=SCALE_NAMES[scale_dtype])

    def load() -> LinearRecord:
        scale = tensors.scale(f"{name}.weight_scale").reshape(-1, 1)
        return LinearRecord(tensors.get(f"{name}.weight"), scale, None, spec)

    return QuantizedLayer(spec, load, _inputs(tensors, name, scheme.input_activations))


def _check_order(tensors: TensorFiles, key: str, columns: int, size: int) -> None:
    tensors.check(key, [columns], [torch.int32, torch.int64], f"an input of {columns}")
    order = tensors.get(key).long()
    if not torch.equal(order, torch.arange(columns) // size):
        raise ModelError(
            "act-order: groups are no neighbours",
            where=f"{tensors.where(key)}: {key}",
            rule=f"groups are {size} neighbours, as every packed kernel has them",
            fix="use a checkpoint made with actorder=weight or none, "
            "or start from the 16-bit model with method.init=gptq",
        )


class _Layout(NamedTuple):
    """How a layer's tensors hold its codes.

    Attributes:
        packed: the weight in words, not in bytes.
        packed_points: its zero points too.
        apart: whole fields a word, as compressed-tensors had it up to 0.17: ten of 3 bits, and 2 bits of nothing.
    """

    packed: bool
    packed_points: bool
    apart: bool


def _record(tensors: TensorFiles, name: str, spec: QuantSpec, shape: list[int], layout: _Layout) -> LinearRecord:
    rows, columns = shape
    if layout.packed:
        codes = _unpacked(tensors.get(f"{name}.weight_packed"), spec.bits, columns, layout.apart)
    else:
        codes = tensors.get(f"{name}.weight")
        _check_range(codes, spec, f"{tensors.where(f'{name}.weight')}: {name}.weight")
    scale = tensors.scale(f"{name}.weight_scale")
    zero_point = None
    if not spec.symmetric:
        key = f"{name}.weight_zero_point"
        zero_point = tensors.get(key)
        if layout.packed_points:
            zero_point = _unpacked(zero_point.t(), spec.bits, rows, layout.apart).t()
        _check_range(zero_point, spec, f"{tensors.where(key)}: {key}")
    if scale.ndim == 1:  # one for the whole tensor: the same numbers, a row each
        scale, zero_point = scale.expand(rows, 1), None if zero_point is None else zero_point.expand(rows, 1)
    return LinearRecord(codes, scale.contiguous(), None if zero_point is None else zero_point.contiguous(), spec)


def _is_apart(shape: list[int], columns: int, bits: int) -> bool:
    """Whether the words are those of whole fields: more than a stream of bits takes, from some 30 columns on."""
    return shape[-1] != words_of(columns, bits) and shape[-1] == _words(columns, bits, apart=True)


def _words(columns: int, bits: int, apart: bool) -> int:
    return -(-columns // (32 // bits)) if apart else words_of(columns, bits)


def _unpacked(words: Tensor, bits: int, columns: int, apart: bool) -> Tensor:
    """Words int32 [rows, words] as codes int8 [rows, columns]."""
    if not apart:
        return unpack_rows(words, bits, columns)
    fields = [(words >> (bits * field)) & ((1 << bits) - 1) for field in range(32 // bits)]
    return signed(torch.stack(fields, dim=-1).reshape(len(words), -1)[:, :columns], bits)


def _check_range(codes: Tensor, spec: QuantSpec, where: str) -> None:
    low, high = int(codes.min()), int(codes.max())
    if low < spec.quant_min or high > spec.quant_max:
        raise ModelError(
            f"numbers from {low} to {high}",
            where=where,
            rule=f"{spec.bits} bits hold {spec.quant_min} .. {spec.quant_max}",
            fix=FIX,
        )


GRANULARITY: dict[str, Granularity] = {"tensor": "per_tensor", "token": "per_token", "group": "per_group"}


def _inputs(tensors: TensorFiles, name: str, args: QuantizationArgs | None) -> InputScheme | None:
    if args is None:
        return None
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy not in GRANULARITY or (not args.dynamic and strategy != "tensor"):
        raise ModelError(
            f"input_activations: {args.type} {strategy}",
            where=f"{tensors.directory}: {name}",
            rule="inputs in codes, dynamic per token, tensor or group, or static per tensor",
            fix=FIX,
        )
    spec = QuantSpec(
        format="fp8_e4m3" if args.type == "float" else f"int{args.num_bits}",
        symmetric=args.symmetric,
        granularity=GRANULARITY[strategy],
        group_size=args.group_size if strategy == "group" else None,
        convention="vllm" if args.type == "float" else "compressed-tensors",
        scale_dtype="fp32",
    )
    if args.dynamic:
        return InputScheme(spec)
    key = f"{name}.input_scale"
    tensors.check(key, [1], FLOATS, "a static input")
    zero_point = None
    if not args.symmetric:
        tensors.check(f"{name}.input_zero_point", [1], [torch.int8], "a static asymmetric input")
        zero_point = tensors.get(f"{name}.input_zero_point").reshape(1, 1)
    return InputScheme(spec, QParams(tensors.scale(key).to(torch.float32).reshape(1, 1), zero_point))
