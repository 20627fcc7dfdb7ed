"""Weights of an image classifier on disk: safetensors, and beside them what their quantizers are."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qtrain.errors import ModelError
from qtrain.files import atomic_directory, write_json
from qtrain.modules.quantizers import quantizers

FILE = "model.safetensors"


def save_weights(model: nn.Module, directory: Path) -> None:
    """Weights and the ranges of their quantizers as ``model.safetensors``, the specs as ``quantizers.json``."""
    specs = {name: quantizer.spec.to_dict() for name, quantizer in quantizers(model)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_directory(directory) as temporary:
        save_file(tensors, temporary / FILE)
        if specs:
            write_json(temporary / "quantizers.json", specs)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights that were trained in full precision.

    Raises:
        ModelError: no such weights, of a quantized model, or of another network.
    """
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(path), rule="a safetensors file") from None
    if (path.parent / "quantizers.json").exists():
        raise ModelError(
            "these weights were trained with quantizers, and have their ranges beside them",
            where=str(path),
            rule="model.weights is where quantization starts from: weights in full precision",
            fix="model.weights of a run with method.name=none; run.resume=true goes on with a quantized run",
        )
    own, there = ({name: tuple(value.shape) for name, value in one.items()} for one in (model.state_dict(), saved))
    if own != there:
        name = sorted(own.items() ^ there.items())[0][0]
        raise ModelError(
            f"{name} is {there.get(name, 'absent')} there and {own.get(name, 'absent')} here",
            where=str(path),
            rule="weights fit the network that model.architecture, model.width and model.classes describe",
            fix="these keys as in the run that trained the weights",
        )
    model.load_state_dict(saved)
