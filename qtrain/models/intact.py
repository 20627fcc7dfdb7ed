"""A model's directory, looked at before any library reads it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from qtrain.errors import ModelError
from qtrain.models.quantized.header import json_object
from qtrain.models.quantized.skeleton import empty_model, plain_config
from qtrain.models.quantized.tensors import TensorFiles

READ = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""What libraries look for in it."""


def check_directory(directory: Path) -> None:
    """Its own files, in sound safetensors, by an index of plain names; headers alone are read.

    Links may lead to elsewhere in the directory, or in the cache of the hub that it is a snapshot of.

    Raises:
        ModelError: what is not so.
    """
    _check_links(directory)
    config = json_object(directory / "config.json")
    # transformers takes ORG/NAME for a kernel of the hub: compiled code, which it downloads and loads.
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(config.get(key) or ""):
            raise ModelError(
                f"{key}={config[key]!r} is a kernel of the hub",
                where=str(directory / "config.json"),
                rule="no code comes with a model",
                fix=f"remove {key} from config.json; model.attention=sdpa chooses one that is installed",
            )
    stored = len(list(TensorFiles(directory)))
    # Each would be made, empty, before anything is compared.
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > stored:
        raise ModelError(
            f"num_hidden_layers={layers:,}, and {stored} tensors are there",
            where=str(directory / "config.json"),
            rule="a layer has tensors of its own",
            fix="download the directory again",
        )


def check_sizes(directory: Path) -> None:
    """Plain weights against the architecture on the meta device: transformers would make what is not there.

    Raises:
        ModelError: a tensor of another shape; less than half of the model's numbers.
    """
    config, files = plain_config(directory), TensorFiles(directory)
    with torch.device("meta"):  # tables that a model computes are as large as its configuration says, too
        model = empty_model(config, torch.bfloat16)
    fix = "download the directory again, or check the sizes in config.json"
    stored = 0
    shapes = {name: list(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    for name in files:
        shape = files.shape(name)
        stored += math.prod(shape)
        if shapes.get(name, shape) != shape:
            raise ModelError(
                f"{name} of shape {shape}",
                where=files.where(name),
                rule=f"config.json makes it {shapes[name]}",
                fix=fix,
            )
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if 2 * stored < wanted:
        raise ModelError(
            f"{stored:,} numbers, and config.json describes {wanted:,}",
            where=str(directory),
            rule="every parameter is in the files, or tied to one that is",
            fix=fix,
        )


def _check_links(directory: Path) -> None:
    home = directory.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    for path in (path for pattern in READ for path in directory.glob(pattern)):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not target.is_relative_to(home):
            raise ModelError(
                f"it is a link to {target}, outside of the directory",
                where=str(path),
                rule="a model is what lies in its directory",
                fix=f"cp --remove-destination {target} {path}, if that file is the one you mean",
            )
