"""Layers of a frozen base in the shapes of their codes, all of them zero: what a base takes, before there is one."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn

from qtrain.modules.frozen_linear import frozen_shell, linears
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import SCALE_DTYPES
from qtrain.numerics.spec import QuantSpec

BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale in 4 bits, and scales that share one where they are quantized too."""


def freeze_shapes(model: nn.Module, base: str, *, double_quant: bool, compute_dtype: torch.dtype) -> None:
    """What ``quantize_base`` makes of a model on the meta device, without numbers."""
    for name, linear in list(linears(model)):
        shell = frozen_shell(linear, base, double_quant=double_quant, compute_dtype=compute_dtype)
        if linear.bias is not None:
            shell.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        model.set_submodule(name, zeroed(shell, double_quant=double_quant))


def zeroed(
    frozen: bnb.nn.Linear4bit | bnb.nn.Linear8bitLt, *, double_quant: bool, device: torch.device | str = "meta"
) -> nn.Module:
    """The shell with codes and scales of zeros on ``device``, in the shapes that ``freeze_linear`` gives them."""
    out, columns = frozen.out_features, frozen.in_features
    if isinstance(frozen, bnb.nn.Linear8bitLt):
        codes = torch.zeros(out, columns, dtype=torch.int8, device=device)
        frozen.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
        frozen.weight.CB, frozen.weight.SCB = frozen.weight.data, torch.zeros(out, device=device)
        frozen.init_8bit_state()
        return frozen
    assert isinstance(frozen.weight, bnb.nn.Params4bit)
    kind, blocks = frozen.weight.quant_type, -(-out * columns // BLOCK)
    known = {"shape": torch.Size((out, columns)), "dtype": frozen.compute_dtype, "blocksize": BLOCK, "quant_type": kind}
    code = torch.zeros(16, device=device)
    state = QuantState(torch.zeros(blocks, device=device), code=code, **known)
    if double_quant:
        outer = torch.zeros(-(-blocks // NESTED_BLOCK), device=device)
        nested = QuantState(outer, code=torch.zeros(256, device=device), blocksize=NESTED_BLOCK, dtype=torch.float32)
        scales = torch.zeros(blocks, dtype=torch.uint8, device=device)
        state = QuantState(scales, code=code, offset=torch.zeros((), device=device), state2=nested, **known)
    frozen.weight = bnb.nn.Params4bit(
        torch.zeros(-(-out * columns // 2), 1, dtype=torch.uint8, device=device),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=double_quant,
        quant_type=kind,
        module=frozen,
        bnb_quantized=True,
    )
    frozen.quant_state = state
    return frozen


def packed_shape(linear: nn.Linear, spec: QuantSpec) -> PackedLinear:
    """A packed layer in the place of ``linear``, on its device."""
    out, columns, device = linear.out_features, linear.in_features, linear.weight.device
    groups = columns // (spec.group_size or columns)
    record = LinearRecord(
        torch.zeros(out, columns, dtype=torch.int8, device=device),
        torch.zeros(out, groups, dtype=SCALE_DTYPES[spec.scale_dtype], device=device),
        None if spec.symmetric else torch.zeros(out, groups, dtype=torch.int8, device=device),
        spec,
    )
    return PackedLinear.from_record(record, linear.bias)
