"""A model whose linear layers stay in its files, each read when it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from qtrain.models.config import ModelSection
from qtrain.models.load import check_files
from qtrain.models.quantized.skeleton import empty_model, plain_config, settle_buffers
from qtrain.models.source import find_model
from qtrain.models.stored import StoredWeights, stored_directory
from qtrain.modules.unread_linear import UnreadLinear

Names = Callable[[PreTrainedModel], Collection[str]]


def load_unread(
    section: ModelSection, dtype: torch.dtype, device: torch.device | str, names: Names
) -> PreTrainedModel | str:
    """The model of ``load_model`` on ``device``, in eval mode, its linear layers called ``names`` still in their files
    (``UnreadLinear``); or in words why transformers has to load it whole.

    Raises:
        ModelError: files that are no model, or are damaged; what is missing in them ``load_model`` tells.
    """
    source = find_model(section)
    check_files(source, trusted=section.trust_remote_code)
    if source.kind == "gguf":
        return "transformers unpacks .gguf files at once"
    if section.trust_remote_code:
        return "code that comes with a model may load it in ways of its own (model.trust_remote_code=true)"
    directory = stored_directory(section)
    assert directory is not None  # only a GGUF file has none
    model = empty_model(plain_config(directory), dtype, section.attention)
    stored = StoredWeights(directory, model, dtype)
    if reason := _needs_conversion(model, stored):
        return reason
    model.name_or_path = model.config.name_or_path = source.location  # what PEFT notes as the base
    # As `from_pretrained` leaves it where no weight had to be converted: a save has nothing to convert back.
    vars(model)["_weight_conversions"] = []
    unread = _leave(model, stored, names(model))
    _read(model, stored, unread, torch.device(device))
    return model


def _needs_conversion(model: PreTrainedModel, stored: StoredWeights) -> str | None:
    """What of the files is not the model's own, name by name and number by number."""
    if stored.absent:
        return f"{stored.absent[0]} is in no file by that name"
    if not stored.complete:
        return "tensors are stored in other shapes than the model's"
    conversions = get_model_conversion_mapping(model)
    for name in stored:
        called = name
        for conversion in conversions:
            called, pattern = conversion.rename_source_key(called)
            if pattern is not None and isinstance(conversion, WeightConverter):
                return f"transformers computes {name} from what the files hold under that name"
        if called != name and called in stored:
            return f"transformers takes {name} of the files for {called}"
    return None


def _leave(model: PreTrainedModel, stored: StoredWeights, names: Collection[str]) -> set[str]:
    """Give the layers their places in the files; the names of their weights. A weight of two layers is read at once."""
    owners = [id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False)]
    ties = model.all_tied_weights_keys
    tied = {*ties, *ties.values()}
    unread = set()
    for name in names:
        linear, weight = model.get_submodule(name), f"{name}.weight"
        assert isinstance(linear, nn.Linear)
        if weight not in tied and owners.count(id(linear.weight)) == 1:
            model.set_submodule(name, UnreadLinear(linear, partial(stored.__getitem__, weight), stored.place(weight)))
            unread.add(weight)
    return unread


@torch.no_grad()
def _read(model: PreTrainedModel, stored: StoredWeights, unread: Collection[str], device: torch.device) -> None:
    """Bring everything else to ``device``, in place."""
    shared: dict[int, nn.Parameter] = {}  # what is one parameter on the meta device stays one
    for module, key, name in _tensors(model):
        if name in unread or name not in stored:
            continue
        value, old = stored[name], getattr(module, key)
        if isinstance(old, nn.Parameter):
            if id(old) not in shared:
                # A mapped file is no memory of the model's: it may be written anew, and would change with it.
                shared[id(old)] = nn.Parameter(value.to(device, copy=True), requires_grad=old.requires_grad)
            value = shared[id(old)]
        else:
            value = value.to(device, copy=True)
        setattr(module, key, value)
    settle_buffers(model, device)
    # Weights that the files hold twice are tied where they are equal, and untied in config and names where not.
    model.tie_weights(missing_keys=set(), recompute_mapping=False)


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    for path, module in model.named_modules():
        for key in (*module._parameters, *module._buffers):
            yield module, key, f"{path}.{key}" if path else key
