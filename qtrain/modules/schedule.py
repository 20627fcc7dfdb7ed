"""When quantization begins, how many bits it has by then, and when ranges stop learning: a function of the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from qtrain.errors import ConfigError
from qtrain.modules.quantizers import quantizers
from qtrain.numerics.spec import INTEGER_BITS
from qtrain.registry import did_you_mean

Formats = Mapping[str, str]
PARTS = ("weight", "activation")
"""What a schedule speaks of; keys and values are activations, embeddings are weights."""


@dataclass(frozen=True)
class Stage:
    """What holds at one step.

    Attributes:
        on: anything is quantized.
        observing: ranges of activations are looked at, to be set when quantization begins.
        frozen: learned ranges stay as they are.
        formats: fewest bits that weights and activations may have now.
    """

    on: bool = True
    observing: bool = False
    frozen: bool = False
    formats: Formats = field(default_factory=dict)

    def changes(self, before: Stage) -> list[str]:
        """What is different from the stage before, in words."""
        lines = []
        if self.on != before.on:
            lines.append("quantization on" if self.on else "full precision")
        for part, format in self.formats.items():
            if before.formats.get(part) not in (None, format):
                lines.append(f"{part}s {before.formats[part]} -> {format}")
        if self.frozen and not before.frozen:
            lines.append("learned ranges frozen")
        return lines

    def figures(self) -> dict[str, float]:
        """The same for a logger."""
        bits = {f"quantization/{part}_bits": float(INTEGER_BITS[format]) for part, format in self.formats.items()}
        return {"quantization/on": float(self.on), "quantization/ranges_frozen": float(self.frozen), **bits}


@dataclass(frozen=True)
class QuantizationSchedule:
    """Steps are optimizer steps; the stage of step s holds for the forward passes that lead to step s + 1.

    Args:
        start_step: full precision before it.
        freeze_ranges_step: learned ranges stay as they are from here on.
        bits: step to format of weights, or to ``{"weight": ..., "activation": ...}``: ``{0: "int8", 1000: "int4"}``. A
            layer whose own format has more bits keeps it.
        observed_steps: steps before ``start_step`` in which ranges of activations are looked at.

    Raises:
        ConfigError: steps below 0, or formats that are no integers.
    """

    start_step: int = 0
    freeze_ranges_step: int | None = None
    bits: Mapping[int, str | Formats] = field(default_factory=dict)
    observed_steps: int = 0

    def __post_init__(self) -> None:
        for name, step in (
            ("start_step", self.start_step),
            ("freeze_ranges_step", self.freeze_ranges_step or 0),
            *(("bits_schedule", step) for step in self.bits),
        ):
            if step < 0:
                raise ConfigError(f"{name}: step {step}", rule="steps count from 0")
        for step, formats in self.bits.items():
            for part, format in _by_part(formats).items():
                where = f"bits_schedule[{step}]"
                if part not in PARTS:
                    raise ConfigError(f"{part!r}", where=where, fix=did_you_mean(part, PARTS))
                if format not in INTEGER_BITS:
                    raise ConfigError(
                        f"format {format!r}", where=where, rule="bits are reduced among " + ", ".join(INTEGER_BITS)
                    )

    @property
    def moves(self) -> bool:
        """Whether anything changes on the way."""
        return bool(self.start_step or self.freeze_ranges_step is not None or self.bits)

    def stage(self, step: int) -> Stage:
        """What holds at that step; before the first entry of ``bits`` the first one does."""
        return Stage(
            on=step >= self.start_step,
            observing=self.start_step - self.observed_steps <= step < self.start_step,
            frozen=self.freeze_ranges_step is not None and step >= self.freeze_ranges_step,
            formats={part: self._format(part, step) for part in PARTS if self._entries(part)},
        )

    def apply(self, model: nn.Module, stage: Stage, own: Formats) -> None:
        """Switch the quantizers of ``model``; learned and static ranges keep their width.

        Args:
            own: format of each quantizer by its name, as it was prepared.
        """
        for name, quantizer in quantizers(model):
            if self.start_step:
                quantizer.enabled = stage.on
            least = stage.formats.get("weight" if quantizer.for_weight else "activation")
            if least is not None and own[name] in INTEGER_BITS:
                format = max(own[name], least, key=lambda one: INTEGER_BITS[one])
                if quantizer.spec.format != format:
                    quantizer.change_format(format)

    def check_end(self, formats: Mapping[str, str | None]) -> None:
        """Raise unless the last entries are what will be deployed.

        Raises:
            ConfigError: more bits are left at the end than were asked for.
        """
        for part in PARTS:
            entries, own = self._entries(part), formats.get(part)
            if entries and own in INTEGER_BITS and INTEGER_BITS[entries[-1][1]] > INTEGER_BITS[own]:
                at, format = entries[-1]
                raise ConfigError(
                    f"bits_schedule ends with {part}s in {format} at step {at}, but {part} is {own}",
                    rule="what is trained last is what is deployed",
                    fix=f"an entry for a later step: {at + 1000}: {own!r}",
                )

    def _format(self, part: str, step: int) -> str:
        entries = self._entries(part)
        past = [format for at, format in entries if at <= step]
        return past[-1] if past else entries[0][1]

    def _entries(self, part: str) -> list[tuple[int, str]]:
        return [(at, formats[part]) for at, entry in sorted(self.bits.items()) if part in (formats := _by_part(entry))]


def _by_part(entry: str | Formats) -> Formats:
    return {"weight": entry} if isinstance(entry, str) else entry
