"""From a 16-bit model to one of packed integers, by a starting point."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.errors import DataError, ModelError
from qtrain.kernels.packed_linear import choose_tiles
from qtrain.methods.config import KEPT
from qtrain.methods.method import Context, Progress, Text
from qtrain.methods.packed.config import PackedKeys
from qtrain.modules.config import QuantizerSection
from qtrain.modules.frozen_linear import linears
from qtrain.modules.layer_options import Options, check_patterns, layer_options, matches
from qtrain.modules.packed_identity import packed_layers
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.record import LinearRecord
from qtrain.modules.unread_linear import in_file_order
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import BlockApSection
from qtrain.ptq.start import Inputs, Start
from qtrain.ptq.walk import quantize_blocks
from qtrain.registry import resolve


def pack_layers(
    model: PreTrainedModel,
    options: PackedKeys,
    *,
    device: torch.device,
    text: Text | None = None,
    context: Context = nullcontext,
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> None:
    """Replace linear layers by packed ones, in place, and move the rest to ``device``; all of it frozen.

    A model that was loaded with packed layers keeps them. A starting point that looks at text runs the
    model on ``device``; of the others each layer crosses to it alone.

    Raises:
        ModelError: a pattern that matches no layer; ``init=checkpoint`` over 16-bit weights.
        DataError: no text for a starting point that needs it.
    """
    model.requires_grad_(False)
    if not packed_layers(model):
        if options.init == KEPT:
            raise ModelError(
                "method.init=checkpoint keeps the codes of a quantized checkpoint, and model.path holds 16-bit weights",
                fix="a GPTQ, AWQ or compressed-tensors directory as model.path, or method.init=gptq",
            )
        _choose(model, options, device, text, context, progress, scratch)
    use_tiles(model, options.kernels, device)
    model.to(device)  # type: ignore[arg-type]


def use_tiles(model: nn.Module, asked: str, device: torch.device) -> None:
    """Let every packed layer use the kernels in Triton from now on, or not, as ``choose_tiles`` says."""
    tiles, _ = choose_tiles(asked, device)
    for layer in packed_layers(model).values():
        layer.tiles = tiles


def reads_weights_alone(options: PackedKeys) -> bool:
    """Whether the starting point quantizes each layer by its own weight."""
    return options.init != KEPT and not options.start.needs_text


def layers_to_pack(model: PreTrainedModel, options: PackedKeys) -> dict[str, Options]:
    """Name to the options of its weight and input, for every linear that is to be packed.

    Raises:
        ModelError: a pattern that matches no layer, or a tied head.
    """
    names = [name for name, _ in linears(model)]
    head = model.get_output_embeddings()
    if options.head and isinstance(head, nn.Linear):
        if head.weight is model.get_input_embeddings().weight:
            raise ModelError(
                f"{options.place}.head=true, and the head shares its weight with the token embedding",
                rule="packed words serve a product, not a look-up",
                fix=f"{options.place}.head=false",
            )
        names.append(next(name for name, module in model.named_modules() if module is head))
    check_patterns(options.skip, names, "skip pattern")
    check_patterns(options.rules, names, "rule")
    kept = [name for name in names if not matches(name, options.skip)]
    general: Options = {
        "weight": options.weight,
        "activation": options.general_activation,
        "pact": None,
        "embedding": None,
    }
    chosen = layer_options(dict.fromkeys(kept, "linear"), general, options.rules, {})
    return {name: asked for name, asked in chosen.items() if asked["weight"] is not None}


def _choose(
    model: PreTrainedModel,
    options: PackedKeys,
    device: torch.device,
    text: Text | None,
    context: Context,
    progress: Progress | None,
    scratch: Path | None,
) -> None:
    chosen = layers_to_pack(model, options)
    by_blocks = isinstance(options.start, BlockApSection)
    rows: Sequence[Tensor] = ()
    if options.start.needs_text:
        if text is None:
            raise DataError(
                f"{options.place}.init={options.init} looks at text, and there is none",
                rule="it takes rows of data.train",
                fix=f"set data.train, or a start that needs none: {options.place}.init=hqq",
            )
        rows = text(options.start.rows if isinstance(options.start, BlockApSection) else options.calibration_rows)
        model.to(device)  # type: ignore[arg-type]
    order = in_file_order({name: model.get_submodule(name) for name in chosen})
    specs = {name: _spec(chosen[name]["weight"]) for name in order}

    def place(name: str, linear: nn.Linear, record: LinearRecord) -> None:
        bias = None if linear.bias is None else linear.bias.detach().to(device)
        packed = PackedLinear.from_record(record, bias, chosen[name]["activation"]).to(device)
        if packed.input_quantizer is not None:
            packed.input_quantizer.enabled = packed.input_quantizer.ready  # static ranges are found afterwards
        model.set_submodule(name, packed)

    run = resolve(options.start.implementation)
    if by_blocks:
        longest = max((row.shape[1] for row in rows), default=0)
        whole = [row for row in rows if row.shape[1] == longest]
        run(model, specs, whole, place=place, options=options.start, context=context, cache=scratch, progress=progress)
    else:
        start: Start[Any] = run(options.start)
        if not options.start.needs_text:
            start = _Crossing(start, device)
        quantize_blocks(model, specs, start, rows, place=place, context=context, progress=progress)
    for layer in packed_layers(model).values():
        if layer.input_quantizer is not None:
            layer.input_quantizer.enabled = True


def _spec(section: QuantizerSection | None) -> QuantSpec:
    assert section is not None
    return section.spec(weight=True)


class _Crossing(Start[Any]):
    """A start that needs no text, each weight on ``device`` while it is quantized: the model need not fit there."""

    def __init__(self, start: Start[Any], device: torch.device) -> None:
        super().__init__(start.options)
        self._start, self._device = start, device

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        return self._start.quantize(weight.to(self._device), spec, inputs)
