"""The frozen base: linears in 4 or 8 bits, quantized one at a time on the device that will hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn
from transformers import PreTrainedModel

from qtrain.kernels.nf4_dequantize import begins_blocks_anew, dequantize_4bit
from qtrain.kernels.nf4_quantize import nf4_quantize
from qtrain.modules.host_memory import give_back
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.unread_linear import in_file_order, read_weight

OUTLIER_THRESHOLD = 6.0
"""Input columns with an entry above this run in 16 bits (LLM.int8(), Dettmers 2022, arXiv 2208.07339)."""


class _Linear8bit(bnb.nn.Linear8bitLt):
    """LLM.int8() that keeps its scales when PEFT moves the weight, as its DoRA does on a CPU at each forward."""

    weight: bnb.nn.Int8Params

    def init_8bit_state(self) -> None:
        if self.weight.SCB is not None:  # a moved weight brings codes without scales; both are in the state already
            self.state.CB, self.state.SCB = self.weight.CB, self.weight.SCB
        self.weight.CB = self.weight.SCB = None


class _Linear4bit(bnb.nn.Linear4bit):
    """NF4 or FP4 that is read as it was stored, rows that end within a block too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.quant_state  # gathered under FSDP2, a weight has no state
        if state is None or not begins_blocks_anew(self.weight, state):
            y: torch.Tensor = super().forward(x)
            return y
        dtype = self.compute_dtype or x.dtype
        y = _Product.apply(x.to(dtype), self.weight, state)  # type: ignore[no-untyped-call]
        return (y if self.bias is None else y + self.bias.to(dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    """x W^T; W is read anew for the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, words: torch.Tensor, state: QuantState) -> torch.Tensor:
        ctx.save_for_backward(words)
        ctx.state = state
        return x @ dequantize_4bit(words.data, state, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return dy @ dequantize_4bit(ctx.saved_tensors[0].data, ctx.state, dy.dtype), None, None


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of every linear of the decoder, in order; the output head is none of them."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def freeze_linear(
    linear: nn.Linear, base: str, *, double_quant: bool, compute_dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A frozen copy of ``linear`` on ``device`` with its weight [out, in] stored as ``base``.

    Args:
        base: ``nf4`` or ``fp4`` (blocks of 64 of the flattened weight, absmax in fp32, or in 8 bits with
            ``double_quant``: 4.127 bits a weight; Dettmers 2023), or ``int8`` (a row each, outlier columns of the
            input in 16 bits).
        compute_dtype: of the product with the dequantized weight.
    """
    frozen = frozen_shell(linear, base, double_quant=double_quant, compute_dtype=compute_dtype)
    weight = read_weight(linear)
    if isinstance(frozen, bnb.nn.Linear8bitLt):
        frozen.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    elif base == "nf4" and device.type == "cpu":
        words, state = nf4_quantize(weight.to(device), double_quant=double_quant)
        frozen.weight = bnb.nn.Params4bit(
            words,
            requires_grad=False,
            quant_state=state,
            compress_statistics=double_quant,
            quant_type=base,
            module=frozen,
            bnb_quantized=True,
        )
        frozen.quant_state = state
    else:
        frozen.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=double_quant, quant_type=base, module=frozen
        )
    return settle(frozen, linear.bias, device)


def frozen_shell(
    linear: nn.Linear,
    base: str,
    *,
    double_quant: bool,
    compute_dtype: torch.dtype,
    threshold: float = OUTLIER_THRESHOLD,
) -> bnb.nn.Linear4bit | bnb.nn.Linear8bitLt:
    """A frozen layer with the widths of ``linear`` that waits for its weight (arguments: ``freeze_linear``)."""
    bias = linear.bias is not None
    if base == "int8":
        return _Linear8bit(
            linear.in_features,
            linear.out_features,
            bias,
            has_fp16_weights=False,
            threshold=threshold,
            device="meta",
        )
    frozen = _Linear4bit(  # type: ignore[no-untyped-call]
        linear.in_features,
        linear.out_features,
        bias,
        compute_dtype=compute_dtype,
        compress_statistics=double_quant,
        quant_type=base,
        device="meta",
    )
    # On CPUs with AVX512-BF16 an evaluation would repack the weight for good, its block scales rounded to bf16:
    # then training, evaluation and export no longer see the same numbers.
    frozen.support_avx512bf16_for_cpu = False
    return frozen


def settle(
    frozen: bnb.nn.Linear4bit | bnb.nn.Linear8bitLt, bias: torch.Tensor | None, device: torch.device
) -> nn.Module:
    """The shell, its weight given, with its bias on ``device``: a weight that is not quantized yet is by that move."""
    if bias is not None:
        frozen.bias = nn.Parameter(bias.data, requires_grad=False)
    frozen = frozen.to(device)
    if isinstance(frozen, bnb.nn.Linear8bitLt):
        # The first forward would move codes and scales from the weight to the state; PEFT's DoRA looks before that.
        frozen.init_8bit_state()
    return frozen


def quantize_base(
    model: PreTrainedModel,
    base: str,
    *,
    double_quant: bool,
    compute_dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[Iterator[tuple[str, nn.Linear]], int], Iterator[tuple[str, nn.Linear]]] | None = None,
) -> None:
    """Replace every linear but lm_head by its frozen copy, then move the rest to ``device``, in place.

    Each layer crosses to the device alone and is quantized there: the 16-bit model is never there whole; in no memory
    at all where the layers are read from their files one by one (``UnreadLinear``).
    """
    layers = list(in_file_order(dict(linears(model))).items())
    for name, linear in progress(iter(layers), len(layers)) if progress else layers:
        frozen = freeze_linear(linear, base, double_quant=double_quant, compute_dtype=compute_dtype, device=device)
        model.set_submodule(name, frozen)
        linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # lets the 16-bit copy go at once
        give_back()
    model.to(device)  # type: ignore[arg-type]


def frozen_kind(layer: nn.Module) -> str | None:
    """What the weight of a linear layer lies in: packed, nf4, fp4, int8 or AQLM; None for plain numbers."""
    if isinstance(layer, PackedLinear):
        return "packed"
    weight = getattr(layer, "weight", None)
    if isinstance(weight, bnb.nn.Params4bit):
        return str(weight.quant_type)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return "int8"
    return "AQLM" if hasattr(layer, "codebooks") else None


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight [out, in] that ``layer`` multiplies with, in fp32 (of a plain linear: its own, upcast)."""
    return stored_weight(layer).float()


def stored_weight(layer: nn.Module) -> torch.Tensor:
    """The same numbers in the dtype that they come in: 4 bits have that of the weight that was quantized."""
    if isinstance(layer, PackedLinear):
        return layer.dense_weight()
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(weight, bnb.nn.Params4bit):
        return dequantize_4bit(weight.data, weight.quant_state, weight.quant_state.dtype)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        codes, largest = layer.state.CB, layer.state.SCB
        assert codes is not None and largest is not None  # freeze_linear initialised them
        return codes.float() * (largest.float() / 127)[:, None]
    return weight.detach()
