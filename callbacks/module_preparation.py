"""What quantization one module gets, how far it is, and how its checkpoints say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qtrain.callbacks.checkpoint_mark import call, mark, take_mark
from qtrain.errors import CheckpointError, ModelError
from qtrain.modules.config import QuantizerSection
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.prepare import attention_modules, kv_quantizers, prepare_kv
from qtrain.modules.prepare import Prepared, prepare_modules
from qtrain.modules.quantizers import quantizers
from qtrain.modules.schedule import QuantizationSchedule

PLACE = "quantization_place"
"""Where a module carries its ``Place``."""


@dataclass
class Place:
    """How far the quantization of one module is.

    Attributes:
        options: that it was prepared with; empty before.
        formats: of each quantizer by name, as it was prepared.
        step: of the schedule, as far as it was applied.
        has_ranges: calibrated, or loaded.
    """

    options: dict[str, Any] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    step: int = 0
    has_ranges: bool = False


def place_of(module: nn.Module) -> Place:
    """The record of a watched module."""
    place = vars(module)[PLACE]
    assert isinstance(place, Place)
    return place


@dataclass(frozen=True)
class ModulePreparation:
    """Options of quantization, to be applied to modules.

    Args:
        made_by: name of the class whose call with ``options`` makes this.
        sections: ``weight``, ``activation``, ``pact`` and ``embedding``.
        rules, skip, first_last, head: see ``qtrain.modules.prepare.prepare_modules``.
        schedule: decides the formats at the step of a checkpoint.
    """

    made_by: str
    sections: Mapping[str, QuantizerSection | None]
    kv_cache: KVCacheSection | None
    rules: dict[str, dict[str, Any]]
    skip: list[str]
    first_last: str | None
    head: bool
    schedule: QuantizationSchedule

    @property
    def options(self) -> dict[str, Any]:
        """What decides what a module becomes, as plain data; what was not given is left out."""
        chosen = {
            **{key: plain(section) for key, section in self.sections.items()},
            "kv_cache": plain(self.kv_cache),
            "rules": self.rules,
            "skip": self.skip,
            "first_last": self.first_last,
            "head": self.head,
            "start_step": self.schedule.start_step,
            "bits_schedule": dict(self.schedule.bits),
        }
        return {key: value for key, value in chosen.items() if value is not None and value not in (False, 0, [], {})}

    def watch(self, module: nn.Module) -> Place:
        """Let ``module.load_state_dict`` take marked checkpoints from now on."""
        if PLACE not in vars(module):
            vars(module)[PLACE] = Place()
            module.register_load_state_dict_pre_hook(self._on_load)
        return place_of(module)

    def prepare(self, module: nn.Module) -> Prepared:
        """Quantize its layers, once.

        Raises:
            ModelError: it was prepared with other options.
        """
        place = self.watch(module)
        if place.options and (different := _differences(place.options, self.options)):
            raise ModelError(
                f"this {type(module).__name__} was quantized with other {', '.join(different)}",
                rule="a module is quantized once",
                fix="a module that was made anew, or the options of the first time",
            )
        prepared = Prepared({})
        if any(self.sections.values()) or self.rules or self.kv_cache is None:
            prepared = prepare_modules(
                module,
                weight=self.sections["weight"],
                activation=self.sections["activation"],
                pact=self.sections["pact"],
                embedding=self.sections["embedding"],
                rules=self.rules,
                skip=self.skip,
                first_last=self.first_last,
                head=self.head,
            )
        if self.kv_cache is not None:
            _prepare_kv(module, self.kv_cache)
        if not place.options:
            place.options = self.options
            place.formats = {name: quantizer.spec.format for name, quantizer in quantizers(module)}
        return prepared

    def mark(self, module: nn.Module, state_dict: dict[str, Any]) -> None:
        """Make a checkpoint of ``module`` say how it was quantized, and at which step of the schedule it is."""
        mark(state_dict, call(self.made_by, self.options), place_of(module).step)

    def _on_load(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        found = take_mark(state_dict, prefix)
        if found is None:
            return
        options, step = found
        place = place_of(module)
        if different := _differences(options, place.options or self.options):
            raise CheckpointError(
                f"this checkpoint was quantized with other {', '.join(different)}",
                rule="what trains must be what was saved",
                fix=call(self.made_by, options),
            )
        stage = self.schedule.stage(step)
        place.step, place.has_ranges = step, stage.on
        self.schedule.apply(module, stage, place.formats)


def plain(value: Any) -> Any:
    """A section as the options that were given."""
    return value.model_dump(exclude_unset=True) if isinstance(value, QuantizerSection) else value


def _prepare_kv(module: nn.Module, section: KVCacheSection) -> None:
    models: list[PreTrainedModel] = []
    for part in module.modules():
        inside = any(part is inner for model in models for inner in model.modules())
        if isinstance(part, PreTrainedModel) and not inside and any(True for _ in attention_modules(part)):
            models.append(part)
    if not models:
        raise ModelError(
            f"{type(module).__name__} holds no transformers decoder",
            where="kv_cache",
            rule="keys and values are those of a causal language model of transformers",
            fix="kv_cache=None",
        )
    for model in models:
        if not any(True for _ in kv_quantizers(model)):
            prepare_kv(model, section)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
