"""Rows as codes of a byte and the scales that they are multiplied with: what a product of bytes takes."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.kernels.fp8_product import has_fp8
from qtrain.numerics.affine import FLOAT_DTYPES, grouped, level_codes
from qtrain.numerics.rules import RULES, Dynamic, Rule
from qtrain.numerics.spec import INTEGER_BITS

try:
    from qtrain.kernels import code_rows
except ImportError:  # Triton comes with torch where there is a GPU
    code_rows = None  # type: ignore[assignment]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def codes(x: Tensor, key: str, scale: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(q, s) with q s = fq(x), row by row; the very codes of the rule, in one pass on a GPU.

    Half-integer levels (mid_rise) come as odd integers 2 q + 1 of s / 2.

    Args:
        x: [.., in].
        key: of a rule of symmetric integers or fp8 with one scale a row, or for all.
        scale: [rows, 1], or [1, 1], where the range is kept or learned.
        factor: fp32 [in]; x * factor is quantized in place of x.

    Returns:
        q int8 or float8 [rows, in], s fp32 [rows].
    """
    if torch.compiler.is_compiling():
        found: tuple[Tensor, Tensor] = torch.ops.qtrain.codes(x, scale, factor, key)
        return found
    return _codes(x, scale, factor, RULES[key])


def plain_codes(
    x: Tensor, rule: Rule, scale: Tensor | None = None, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    dtype, spec = x.dtype, rule.spec
    x = x.reshape(-1, x.shape[-1])
    if factor is not None:
        x = x.to(torch.float32) * factor
    qparams = rule.qparams(x, scale, None)
    levels = level_codes(grouped(x, spec), qparams, spec)
    # As a consumer of x's dtype reads the scale; one that is never stored is no consumer's.
    used = qparams.scale if spec.scale_dtype == "fp32" else qparams.scale.to(dtype)
    used = used.to(torch.float32).flatten()
    if spec.mid_rise:
        levels.mul_(2.0).add_(1.0)
        used = used * 0.5
    if spec.rows_share_scales:
        used = used.repeat(len(x))
    return levels.to(_dtype(rule)).view(x.shape), used


def numbers(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fq(x) [rows, in] in ``dtype`` from its codes and scales, bit for bit the simulated one."""
    if torch.compiler.is_compiling() or not _one_pass(codes) or dtype not in FLOATS:
        wide = codes.to(torch.float32) if codes.is_floating_point() else codes  # fp8 is promoted to nothing
        return (wide * scale.unsqueeze(1)).to(dtype)
    return code_rows.numbers(codes, scale, dtype)


def turned(codes: Tensor) -> Tensor:
    """q^T contiguous: int8 tensor cores want both sides so along the sum."""
    if torch.compiler.is_compiling() or not _one_pass(codes):
        return codes.t().contiguous()
    return code_rows.turned(codes)


def kernels_know(rule: Rule) -> bool:
    """Whether they decide this rule's integers: they divide by a scale, where torchao multiplies with its inverse."""
    return rule.spec.format in INTEGER_BITS and rule.spec.convention != "torchao"


def _fp8_kernel_knows(rule: Rule, device: torch.device) -> bool:
    return rule.spec.format == "fp8_e4m3" and not rule.spec.rows_share_scales and has_fp8(device)


def _one_pass(x: Tensor) -> bool:
    typed = x.dtype not in FLOAT_DTYPES.values() or has_fp8(x.device)
    return code_rows is not None and x.is_cuda and x.numel() > 0 and typed


def _dtype(rule: Rule) -> torch.dtype:
    return FLOAT_DTYPES.get(rule.spec.format, torch.int8)


def _codes(x: Tensor, scale: Tensor | None, factor: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    if isinstance(rule, Dynamic):
        scale = None  # a learned range that lies there is not asked
    if (kernels_know(rule) or _fp8_kernel_knows(rule, x.device)) and _one_pass(x) and x.dtype in FLOATS:
        return code_rows.codes(rule, x, scale, factor)
    return plain_codes(x, rule, scale, factor)


@torch.library.custom_op("qtrain::codes", mutates_args=())
def _codes_op(x: Tensor, scale: Tensor | None, factor: Tensor | None, key: str) -> tuple[Tensor, Tensor]:
    return _codes(x, scale, factor, RULES[key])


@_codes_op.register_fake
def _(x: Tensor, scale: Tensor | None, factor: Tensor | None, key: str) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    return torch.empty_like(rows, dtype=_dtype(RULES[key])), rows.new_empty(rows.shape[0], dtype=torch.float32)
