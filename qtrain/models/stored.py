"""16-bit weights of a directory, by the names of a model's parameters: one in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel

from qtrain.models.config import ModelSection
from qtrain.models.load import unreadable
from qtrain.models.quantized.header import read_header
from qtrain.models.quantized.skeleton import empty_model, plain_config, restore_generation
from qtrain.models.quantized.tensors import TensorFiles, weight_map
from qtrain.models.source import find_model


class StoredWeights(Mapping[str, Tensor]):
    """What ``load_model`` would load: each look-up reads one tensor, on the CPU.

    Args:
        directory: with config.json and safetensors.
        model: its architecture on the meta device; what the files hold once for two parameters is tied there.
        dtype: of floating-point weights.
        absent: names of parameters that are stored in another way, and are none of these.

    Attributes:
        absent: names of the model's tensors that no file holds; fused experts, say, are stored apart.
        complete: there is none, and all have the model's shapes.

    Raises:
        ModelError: damaged files.
    """

    def __init__(
        self, directory: Path, model: PreTrainedModel, dtype: torch.dtype, absent: Collection[str] = ()
    ) -> None:
        self._files, self._dtype = TensorFiles(directory), dtype
        missing = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {*self._files, *absent}
        if missing:
            model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
        restore_generation(model, directory)
        places: dict[int, str] = {}
        self._names: dict[str, str] = {}
        self._in_fp32 = [
            re.compile(rf"(^|\.){re.escape(key)}(\.|$)") for key in model._keep_in_fp32_modules_strict or ()
        ]
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **_saved_buffers(model)}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in absent}
        for name, tensor in tensors.items():
            if name in self._files:
                places.setdefault(id(tensor), name)
        for name, tensor in tensors.items():
            if (place := name if name in self._files else places.get(id(tensor))) is not None:
                self._names[name] = place
        self.absent = sorted(tensors.keys() - self._names.keys())
        self.complete = not self.absent and all(
            self._files.shape(place) == list(tensors[name].shape) for name, place in self._names.items()
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def place(self, name: str) -> tuple[str, int]:
        """The file that holds a tensor, and its first byte there."""
        return self._files.place(self._names[name])

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._files.get(self._names[name])
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if any(pattern.search(name) for pattern in self._in_fp32) else self._dtype)


def stored_weights(section: ModelSection, dtype: torch.dtype) -> tuple[PreTrainedModel, StoredWeights] | None:
    """The architecture of ``model.path`` on the meta device, and its weights; None where they are no plain safetensors
    by the names of the model's parameters, so that transformers has to load it whole.
    """
    directory = stored_directory(section)
    if directory is None or section.trust_remote_code or read_header(directory) is not None:
        return None
    model = empty_model(plain_config(directory), dtype, section.attention)
    weights = StoredWeights(directory, model, dtype)
    return (model, weights) if weights.complete else None


def stored_directory(section: ModelSection) -> Path | None:
    """Where the safetensors of ``model.path`` lie, a hub id's in the local cache; None of a GGUF file.

    Raises:
        ModelError: a hub id that cannot be downloaded.
    """
    source = find_model(section)
    if source.kind == "directory":
        return Path(source.location)
    if source.kind == "gguf":
        return None
    try:
        files = [*_weight_files(source.location, section.revision), "*.json"]
        return Path(snapshot_download(source.location, revision=section.revision, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise unreadable("model", source, error) from None


def _weight_files(hub_id: str, revision: str | None) -> list[str]:
    """Those that make up the model: beside them a repository may hold the same weights in other layouts."""
    try:
        index = Path(hf_hub_download(hub_id, "model.safetensors.index.json", revision=revision))
    except EntryNotFoundError:  # in one file; or, without a network, not in the cache
        return ["model.safetensors"]
    return sorted(set(weight_map(index).values()))


def _saved_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
    return found
