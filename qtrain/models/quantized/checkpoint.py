"""Quantized checkpoints of other tools as bases: their integers as they are, nothing quantized anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from qtrain.errors import ModelError
from qtrain.models.quantized.header import read_header
from qtrain.models.quantized.layer import QuantizedLayer
from qtrain.models.quantized.registry import CODEBOOKS, INTEGERS
from qtrain.models.quantized.skeleton import empty_model, load_rest, plain_config
from qtrain.models.quantized.tensors import TensorFiles
from qtrain.modules.record import LinearRecord


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A directory of affine codes; headers are checked, no weight is in memory yet.

    Attributes:
        directory: where it lies.
        method: that made it, as its header says: gptq, awq, compressed-tensors, hqq.
        was: the format in words.
        config: of the plain architecture.
        layers: the quantized linears by module name, in the order of the model.
        others: the plain tensors (embeddings, norms, biases, unquantized linears) by the model's names for them.
        notes: what is worth knowing.
    """

    directory: Path
    method: str
    was: str
    config: PretrainedConfig
    layers: Mapping[str, QuantizedLayer]
    others: Mapping[str, Callable[[], Tensor]]
    notes: tuple[str, ...] = ()

    @property
    def records(self) -> dict[str, Callable[[], LinearRecord]]:
        """What reads each layer's codes, by module name; one layer in memory at a time."""
        return {name: layer.load for name, layer in self.layers.items()}

    @property
    def facts(self) -> dict[str, Any]:
        """What it was, for figures and the terminal; bits and groups are those of most layers."""
        (spec, _), *others = Counter(layer.spec for layer in self.layers.values()).most_common()
        return {
            "was": self.was,
            "bits": spec.bits,
            "group_size": spec.group_size,
            "symmetric": spec.symmetric,
            "layers": len(self.layers),
            "mixed": bool(others),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The facts, a fact a line."""
        kinds = Counter(layer.spec for layer in self.layers.values()).most_common()
        what = "; ".join(
            f"{count} linears in {spec.format} {'symmetric' if spec.symmetric else 'asymmetric'}, "
            + (f"groups of {spec.group_size}" if spec.group_size else "one scale a row")
            for spec, count in kinds
        )
        return [f"base        {self.was}: {what}", *(f"            {note}" for note in self.notes)]


def read_quantized(directory: Path, *, whole_zero_points: bool = True) -> QuantizedCheckpoint:
    """Look at all headers of a GPTQ, AWQ, compressed-tensors or HQQ directory, and check them against one another.

    Args:
        whole_zero_points: refuse HQQ's fractions, which no integer kernel takes; False for who multiplies in floats.

    Raises:
        ModelError: plain weights, another method, a layout that is not read, damaged files.
    """
    header = read_header(directory)
    method = None if header is None else str(header["quant_method"])
    if header is None or method not in INTEGERS.names():
        raise _no_integers(directory, method)
    config = plain_config(directory)
    linears = {
        name: module
        for name, module in empty_model(config, torch.bfloat16).named_modules()
        if isinstance(module, nn.Linear)
    }
    tensors = TensorFiles(directory)
    reading = INTEGERS.get(method)(tensors, header, linears)
    if not reading.layers:
        raise ModelError(
            f"quant_method={method!r}, and no tensor in its layout",
            where=str(directory),
            rule="the header describes the tensors beside it",
            fix="remove quantization_config from config.json, if the weights are plain",
        )
    notes = reading.notes
    if odd := [name for name, layer in reading.layers.items() if not layer.whole_zero_points]:
        if whole_zero_points:
            raise ModelError(
                f"zero points of {len(odd)} layers are no whole numbers, the first of {odd[0]}",
                where=str(directory),
                rule="packed integers have integers for zero points",
                fix="start from the 16-bit model with method.init=hqq: it rounds them and solves the scales again",
            )
        notes += (f"zero points of {len(odd)} layers are no whole numbers: no integer kernel takes them",)
    return QuantizedCheckpoint(
        directory=directory,
        method=method,
        was=reading.was,
        config=config,
        layers={name: reading.layers[name] for name in linears if name in reading.layers},
        others={name: partial(tensors.get, name) for name in tensors if name not in reading.tensors},
        notes=notes,
    )


def read_records(directory: Path) -> Iterator[tuple[str, LinearRecord]]:
    """Every quantized layer of a directory by module name, read one at a time; errors as ``read_quantized``."""
    for name, load in read_quantized(directory).records.items():
        yield name, load()


def load_skeleton(
    checkpoint: QuantizedCheckpoint, dtype: torch.dtype, device: torch.device | str = "cpu", *, attention: str = "auto"
) -> PreTrainedModel:
    """The model in eval mode with everything but the quantized weights, in ``dtype`` on ``device``.

    Each quantized linear is an nn.Linear with its bias, and its weight on the meta device: replace it.

    Raises:
        ModelError: tensors that are not the model's.
    """
    model = empty_model(checkpoint.config, dtype, attention)
    absent = {f"{name}.weight" for name in checkpoint.layers}
    tied = set(model.all_tied_weights_keys) & absent
    if tied:
        raise ModelError(
            f"{min(tied)} is quantized, and tied to the embedding",
            where=str(checkpoint.directory),
            rule="a tied weight has no codes of its own",
            fix='"tie_word_embeddings": false in config.json, if the embedding is another matrix',
        )
    load_rest(model, checkpoint.others, absent, checkpoint.directory, torch.device(device))
    return model


def load_codebooks(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    compute_dtype: torch.dtype,
    attention: str = "auto",
) -> PreTrainedModel:
    """A bitsandbytes or AQLM directory with the layers of those libraries, frozen; in eval mode.

    Args:
        dtype: of everything that is not quantized.
        compute_dtype: of the product with a dequantized weight.

    Raises:
        ModelError: another method, damaged files, a package that is not installed.
    """
    header = read_header(directory)
    method = None if header is None else str(header["quant_method"])
    if header is None or method not in CODEBOOKS.names():
        raise _no_integers(directory, method)
    return CODEBOOKS.get(method)(
        directory, header, dtype, torch.device(device), compute_dtype=compute_dtype, attention=attention
    )


def _no_integers(directory: Path, method: str | None) -> ModelError:
    if method is None:
        return ModelError("no quantization_config in config.json", where=str(directory), rule="its weights are plain")
    if method in CODEBOOKS.names():
        return ModelError(
            f"quant_method={method!r}",
            where=str(directory),
            rule="its codes are places in a table, not multiples of a scale that could be trained",
            fix="method.name=qlora puts adapters on it; for PEQA start from the 16-bit model",
        )
    readable = ", ".join([*INTEGERS.names(), *CODEBOOKS.names()])
    return ModelError(
        f"quant_method={method!r} is not read",
        where=str(directory),
        rule=f"there is: {readable}",
        fix="start from the 16-bit model it was made from",
    )
