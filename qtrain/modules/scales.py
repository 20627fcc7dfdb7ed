"""A task as a file of scales: what PEQA trains, swapped on a live model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qtrain.errors import CheckpointError, ModelError
from qtrain.files import atomic_file
from qtrain.modules.packed_identity import packed_identity, packed_layers
from qtrain.modules.packed_linear import PackedLinear

FILE = "scales.safetensors"
RULE = "the scales of a task are a safetensors file that save_scales wrote"
FIX = "RUN/scales of a finished run with method.name=peqa"
SCALE, ZERO_POINT = ".scale", ".zero_point"


@dataclass(frozen=True)
class Scales:
    """The scales of one task.

    Attributes:
        tensors: LAYER.scale [out, groups] in 16 bits, and LAYER.zero_point int8 where those were trained.
        base: identity of the packed base that they belong to.
        source: where they were read from.
    """

    tensors: dict[str, Tensor]
    base: str
    source: str = "memory"

    def to(self, device: torch.device | str) -> Scales:
        """The same on another device: a switch there copies nothing across."""
        return Scales({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.base, self.source)


def take_scales(model: nn.Module) -> Scales:
    """The scales that ``model`` multiplies with by now, as they are stored.

    Raises:
        ModelError: it has no packed layer.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in _layers(model).items():
        tensors[name + SCALE] = layer.stored_scale().clone()
        points = layer.stored_zero_point() if layer.zero is not None else None
        if points is not None:
            tensors[name + ZERO_POINT] = points
    return Scales(tensors, packed_identity(model))


def save_scales(model: nn.Module, path: str | Path) -> Path:
    """Write the scales of ``model``: to ``path``, or to scales.safetensors in it where it is a directory."""
    target = _file(Path(path))
    taken = take_scales(model)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in taken.tensors.items()}
    with atomic_file(target) as temporary:
        save_file(tensors, str(temporary), metadata={"format": "pt", "base": taken.base})
    return target


def load_scales(path: str | Path, device: torch.device | str = "cpu") -> Scales:
    """Read what ``save_scales`` wrote.

    Raises:
        CheckpointError: no such file, a damaged one, or one that holds something else.
    """
    source = _file(Path(path))
    if not source.is_file():
        raise CheckpointError("no such file of scales", where=str(source), rule=RULE, fix=FIX)
    try:
        with safe_open(str(source), framework="pt", device=str(device)) as file:
            base = (file.metadata() or {}).get("base")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(source), rule=RULE, fix=FIX) from None
    if base is None or not all(name.endswith((SCALE, ZERO_POINT)) for name in tensors):
        raise CheckpointError("this is no file of scales", where=str(source), rule=RULE, fix=FIX)
    return Scales(tensors, base, str(source))


@torch.no_grad()
def switch(model: nn.Module, scales: Scales) -> None:
    """Give a live model another task's scales: copies in place, a few milliseconds.

    Zero points that a task did not train are the base's again.

    Raises:
        ModelError: they belong to another base, or do not fit; the model is as it was then.
    """
    layers = _layers(model)
    check_fit(scales, packed_identity(model), layers)
    for name, layer in layers.items():
        layer.set_ranges(scales.tensors[name + SCALE], scales.tensors.get(name + ZERO_POINT))


def check_fit(scales: Scales, here: str, layers: Mapping[str, PackedLinear]) -> None:
    """Raise unless the scales are those of this packed base.

    Args:
        here: the base's identity.

    Raises:
        ModelError: they belong to another base, or do not fit.
    """
    if scales.base != here:
        raise ModelError(
            f"these scales belong to the packed base {scales.base}, and this one is {here}",
            where=scales.source,
            rule="scales fit the codes that they were trained over",
            fix="load the base of their run (RUN/base)",
        )
    for name, layer in layers.items():
        found = scales.tensors.get(name + SCALE)
        if found is None or found.shape != layer.scale.shape:
            raise ModelError(
                f"{name} has scales of shape {list(layer.scale.shape)}, and "
                f"{'none' if found is None else list(found.shape)} there",
                where=scales.source,
                rule="one scale for each group of each packed layer",
                fix="load the base of their run (RUN/base)",
            )


def _layers(model: nn.Module) -> dict[str, PackedLinear]:
    layers = packed_layers(model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no packed layer",
            rule="scales belong to a model of packed integers",
            fix="load RUN/base of a run with method.name=peqa: qtrain.load_packed",
        )
    return layers


def _file(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / FILE
