"""The quantizers of one attention module, its ``kv_quantizer``."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qtrain.errors import ModelError
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.layout import Layout, layouts
from qtrain.modules.kv.residual import Window
from qtrain.modules.kv.sites import Site
from qtrain.modules.quantizer import Quantizer


class KVQuantizer(nn.Module):
    """Keys and values [B, H_kv, S, D] on their levels, each row of ``layout`` with a scale of its own.

    Attributes:
        key, value: the quantizers; what they learn is in the attention module's state.
        window: where some tokens stay in full precision.
        sites: what is hooked before the rotary embedding; empty if keys are quantized after it.
        handles: of those hooks.
        reader: the layer of a cache of codes while attention runs with one, which then says what attention sees.
        back_end: the attention function behind the quantizers, and ``stand_in`` what it gets for the module.
    """

    def __init__(self, section: KVCacheSection) -> None:
        super().__init__()
        self.section = section
        self.key, self.value = Quantizer(section.key_section()), Quantizer(section.value_section())
        self.key_layout, self.value_layout = layouts(section)
        group = section.group_size if section.shared == "per_channel" else None
        self.window = Window(section.window, group or 1) if section.window or group else None
        self.sites: tuple[Site, ...] = ()
        self.handles: list[RemovableHandle] = []
        self.reader: Any = None
        self.back_end: Callable[..., tuple[Tensor, Tensor | None]]
        self.stand_in: SimpleNamespace | None = None

    @property
    def active(self) -> bool:
        """Whether keys or values are changed or looked at."""
        return acts(self.key) or acts(self.value)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Both on their levels, in their dtypes; untouched where the quantizer is off."""
        return on_levels(key, self.key, self.key_layout), on_levels(value, self.value, self.value_layout)

    def at_site(self, site: Site, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of a site: its keys and values on their levels before they go on."""
        parts = site.take(output, inputs)
        if self.reader is not None:
            self.reader.see(parts)
        if not self.active:
            return None
        how = {"key": (self.key, self.key_layout), "value": (self.value, self.value_layout)}
        return site.put({name: on_levels(part, *how[name]) for name, part in parts.items()}, output, inputs)

    def check_sites(self, attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Forward pre-hook of the attention module.

        Raises:
            ModelError: a hooked module was replaced, by adapters for one.
        """
        for site in self.sites:
            if getattr(attention, site.name) is not site.module:
                raise ModelError(
                    f"{site.name} of a {type(attention).__name__} was replaced after its output was to be quantized",
                    rule="layers are swapped and adapters added before prepare_kv",
                    fix="remove_kv(model), then prepare_kv(model, section)",
                )


def acts(quantizer: Quantizer) -> bool:
    """Whether it changes or looks at what it is given."""
    return quantizer.enabled or quantizer.observer is not None


def on_levels(x: Tensor, quantizer: Quantizer, layout: Layout) -> Tensor:
    """[B, H, S, D] fake-quantized by rows of ``layout``; itself where the quantizer is off or S is 0."""
    if not acts(quantizer) or x.shape[2] == 0:
        return x
    return layout.heads(quantizer(layout.rows(x)), x.shape[1])
