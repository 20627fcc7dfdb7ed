"""A W8A8 export in onnxruntime: products of floats in a graph become products of the trained codes."""

from __future__ import annotations

import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtrain.errors import ExportError
from qtrain.files import atomic_directory
from qtrain.models.quantized.checkpoint import read_quantized
from qtrain.models.quantized.layer import InputScheme, QuantizedLayer
from qtrain.numerics.affine import SMALLEST_FP32_SCALE

NODE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)/MatMul")
UINT8, FLOAT = 2, 1
"""Of ONNX's TensorProto."""


def use_int8_products(built: Path, export: Path, directory: Path) -> list[str]:
    """Write ``directory``: the graph that onnxruntime-genai's builder made, with the layers of a W8A8 export in int8.

    y = s_x s_w ((u - z) q^T), the sum by ``MatMulInteger``. Inputs become codes in the graph as they did in training:
    each token by its own extremes, or by the static range. The whole graph is in memory. Exact on CPUs with VNNI; on
    others it was not tried, and the kernels that were (oneDNN's) saturate.

    Args:
        built: ``python -m onnxruntime_genai.models.builder -p fp32 -e cpu`` of the run's ``export.format=merged``.
        export: the same run's ``export.format=compressed-tensors``.

    Returns:
        The nodes whose products were exchanged.

    Raises:
        ExportError: a layer that is no W8A8, or that the graph does not have.
    """
    onnx = import_module("onnx")  # no dependency of qtrain
    layers = read_quantized(export).layers
    model = onnx.load(str(built / "model.onnx"))
    graph = _Graph(onnx)
    exchanged: dict[str, list[str]] = {}
    for node in model.graph.node:
        names = _layers_of(node.name)
        if node.op_type == "MatMul" and all(name in layers for name in names) and names:
            graph.multiply(node, [layers[name] for name in names])
            exchanged[node.name] = names
        else:
            graph.nodes.append(node)
    missing = layers.keys() - {name for names in exchanged.values() for name in names}
    if missing:
        raise ExportError(
            f"{len(missing)} of {len(layers)} layers are not in the graph",
            where=f"{built}: {min(missing)}",
            rule="the graph is the builder's, of a decoder's linear layers without adapters, in fp32",
            fix="python -m onnxruntime_genai.models.builder -i MERGED -o BUILT -p fp32 -e cpu",
        )
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in graph.dropped]
    made = [onnx.numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in graph.constants.items()]
    for field, content in (("node", graph.nodes), ("initializer", kept + made)):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(content)
    with atomic_directory(directory) as temporary:
        for file in built.iterdir():
            if file.is_file() and not file.name.startswith("model.onnx"):
                shutil.copy(file, temporary)
        onnx.save(model, str(temporary / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    return list(exchanged)


def _layers_of(node: str) -> list[str]:
    """The layers whose weights a node of the builder holds: queries, keys and values are one product there."""
    found = NODE.fullmatch(node)
    if not found:
        return []
    number, block, linear = found.groups()
    parts = ("q_proj", "k_proj", "v_proj") if linear == "qkv_proj" else (linear,)
    return [f"model.layers.{number}.{'self_attn' if block == 'attn' else block}.{part}" for part in parts]


class _Graph:
    """Nodes and constants of the new graph."""

    def __init__(self, onnx: Any) -> None:
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.constants: dict[str, Tensor] = {}
        self.dropped: set[str] = set()
        self._codes: dict[str, str] = {}

    def multiply(self, node: Any, layers: list[QuantizedLayer]) -> None:
        """The node's product, of codes."""
        x, weight = node.input
        for layer in layers:
            _check(node.name, layer)
        inputs = layers[0].inputs
        assert inputs is not None  # checked
        if x not in self._codes:
            self._codes[x] = f"{node.name}/input"
            self._quantize(x, self._codes[x], inputs)
        records = [layer.load() for layer in layers]
        self.dropped.add(weight)
        codes = self._constant(f"{weight}.codes", torch.cat([record.codes for record in records]).t())
        scale = self._constant(f"{weight}.scale", torch.cat([record.scale for record in records]).flatten().float())
        code, middle, step = (f"{self._codes[x]}/{part}" for part in ("code", "middle", "step"))
        total = self._add("MatMulInteger", f"{node.name}/sum", code, codes, middle)
        number = self._add("Cast", f"{node.name}/number", total, to=FLOAT)
        self._add("Mul", node.output[0], self._add("Mul", f"{node.name}/rows", number, step), scale)

    def _quantize(self, x: str, name: str, inputs: InputScheme) -> None:
        """``NAME/code`` = clip(round(x / step) + z, ..), unsigned, with its zero point ``NAME/middle`` = 128 + z."""
        spec, zero, step = inputs.spec, 0, f"{name}/step"
        if inputs.qparams is None:
            axis, reach = torch.tensor([-1]), torch.tensor(spec.reach, dtype=torch.float32)
            size = self._add("Abs", f"{name}/size", x)
            size = self._add("ReduceMax", f"{name}/largest", size, self._constant(f"{name}/axis", axis), keepdims=1)
            size = self._add("Div", f"{name}/quotient", size, self._constant(f"{name}/reach", reach))
            self._add("Max", step, size, self._constant(f"{name}/smallest", torch.tensor(SMALLEST_FP32_SCALE)))
        else:
            zero = 0 if inputs.qparams.zero_point is None else int(inputs.qparams.zero_point)
            self._constant(step, inputs.qparams.scale.float().reshape(()))
        self._constant(f"{name}/middle", torch.tensor(128 + zero, dtype=torch.uint8))
        offset, low, high = (
            self._constant(f"{name}/{part}", torch.tensor(128.0 + value))
            for part, value in (("offset", zero), ("low", spec.quant_min), ("high", spec.quant_max))
        )
        whole = self._add("Round", f"{name}/whole", self._add("Div", f"{name}/scaled", x, step))
        moved = self._add("Add", f"{name}/moved", whole, offset)
        self._add("Cast", f"{name}/code", self._add("Clip", f"{name}/clipped", moved, low, high), to=UINT8)

    def _constant(self, name: str, value: Tensor) -> str:
        self.constants[name] = value
        return name

    def _add(self, kind: str, output: str, *inputs: str, **keys: int) -> str:
        self.nodes.append(self._onnx.helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **keys))
        return output


def _check(node: str, layer: QuantizedLayer) -> None:
    inputs, weight = layer.inputs, layer.spec
    by_row = weight.symmetric and weight.granularity == "per_channel" and not weight.is_float
    if (
        not by_row
        or inputs is None
        or inputs.spec.format != "int8"
        or (inputs.qparams is None and not inputs.spec.symmetric)
    ):
        raise ExportError(
            "a layer without a product of bytes",
            where=node,
            rule="weights are symmetric with one scale a row, inputs int8: symmetric by token, or by one static range",
            fix="export.format=gptq, which the builder reads itself; or method.activation.format=int8",
        )
