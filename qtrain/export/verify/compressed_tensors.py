"""compressed-tensors read back: codes as they are stored, and what a consumer makes of targets and ignore list."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from compressed_tensors.utils import match_targets
from torch import nn

from qtrain.errors import ExportError
from qtrain.export.verify.stored import Stored
from qtrain.models.quantized.compressed_tensors import read as read_layers
from qtrain.models.quantized.header import read_header
from qtrain.models.quantized.layer import QuantizedLayer
from qtrain.models.quantized.tensors import TensorFiles


def read(directory: Path, linears: Mapping[str, nn.Linear]) -> Stored:
    """Layers, plain tensors, and the linears that targets match and ``ignore`` does not.

    Raises:
        QtrainError: another method, or tensors that contradict the header.
    """
    header = read_header(directory)
    method = header and header["quant_method"]
    if header is None or method != "compressed-tensors":
        raise ExportError(
            f"quantization_config.quant_method={method!r}",
            where=str(directory / "config.json"),
            rule="it is 'compressed-tensors': consumers choose their reader by it",
        )
    if header.get("quantization_status") != "compressed":
        raise ExportError(
            f"quantization_config.quantization_status={header.get('quantization_status')!r}",
            where=str(directory / "config.json"),
            rule="it is 'compressed': else consumers take the words for weights",
        )
    tensors = TensorFiles(directory)
    reading = read_layers(tensors, header, linears)
    targets = [target for group in header["config_groups"].values() for target in group["targets"]]
    ignored = header.get("ignore") or []
    return Stored(
        reading.layers,
        {name: partial(tensors.get, name) for name in tensors if name not in reading.tensors},
        claimed=[
            name
            for name, linear in linears.items()
            if match_targets(name, linear, targets) and not match_targets(name, linear, ignored)
        ],
        surplus=sorted(reading.tensors - _expected(tensors, reading.layers)),
    )


def _expected(tensors: TensorFiles, layers: Mapping[str, QuantizedLayer]) -> set[str]:
    """The tensors that a layer of its kind has."""
    expected = set[str]()
    for name, layer in layers.items():
        parts = ["weight_scale"]
        parts += ["weight_packed", "weight_shape"] if f"{name}.weight_packed" in tensors else ["weight"]
        parts += [] if layer.spec.symmetric else ["weight_zero_point"]
        if layer.inputs is not None and layer.inputs.qparams is not None:
            parts += ["input_scale"] if layer.inputs.spec.symmetric else ["input_scale", "input_zero_point"]
        expected |= {f"{name}.{part}" for part in parts}
    return expected
