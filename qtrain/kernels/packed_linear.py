"""y = x W^T + b with W in packed integers: unpacked for the product, and again for its backward, never kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.kernels.kept_output import KeptOutput
from qtrain.numerics.affine import QParams, dequantize, round_scale
from qtrain.numerics.packing import unpack
from qtrain.numerics.spec import QuantSpec

try:
    from qtrain.kernels import packed_tiles
except ImportError:  # Triton comes with torch where there is a GPU
    packed_tiles = None  # type: ignore[assignment]

CHUNK_BYTES = 64 * 2**20
"""Of the weight's gradient, fp32, that is there at a time while it is summed into the scales' gradients."""


class Packed(NamedTuple):
    """What does not train.

    Attributes:
        words: int32 [out, words] of codes.
        columns: in.
        spec: what the codes mean.
        outlier_index: int32 [n], flattened positions of weights that are kept in 16 bits, or None.
        outlier_value: [n], those.
        whole_zero_points: False where zero points are fp32 numbers of any value (HQQ's), never rounded.
        tiles: let the kernels in Triton do what they know.
    """

    words: Tensor
    columns: int
    spec: QuantSpec
    outlier_index: Tensor | None = None
    outlier_value: Tensor | None = None
    whole_zero_points: bool = True
    tiles: bool = False


def packed_weight(packed: Packed, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W [out, in] = (q - z) s as a consumer that runs in ``dtype`` computes it; scale and z rounded as stored."""
    return _weight(packed, round_scale(scale, packed.spec), zero_point, dtype)


def _weight(packed: Packed, stored: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    spec, qparams = packed.spec, QParams(stored, _stored(zero_point, packed))
    if _tiled(packed, stored, dtype):
        seen = qparams.scale if spec.scale_dtype == "fp32" else qparams.scale.to(dtype)
        arguments = (packed.words, spec.bits, packed.columns, seen, qparams.zero_point, dtype)
        weight = packed_tiles.dequantize(*arguments, mid_rise=spec.mid_rise)
    else:
        codes = unpack(packed.words, spec.bits, packed.columns)
        weight = dequantize(codes, qparams, spec, torch.float32 if dtype == torch.float64 else dtype).to(dtype)
    if packed.outlier_index is not None and packed.outlier_value is not None:
        weight.view(-1)[packed.outlier_index.long()] = packed.outlier_value.to(dtype)
    return weight


def packed_linear(
    x: Tensor,
    packed: Packed,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    guard: KeptOutput | None = None,
) -> Tensor:
    """Linear layer over packed integers; gradients reach x, scale and a zero point that is a float.

    With G = dY^T X: dL/ds[o, g] = sum_{k in g} G[o, k] (q[o, k] - z[o, g]) and dL/dz[o, g] = -s sum_{k in g} G[o, k],
    straight through the rounding of s and z as stored (Kim 2023, arXiv 2305.14152; Chen 2024, arXiv 2407.11062). One
    scale a row needs no G: dL/ds[o] = sum_t dY[t, o] Y[t, o] / s[o]. Saved for the backward: X, or Y where it does.

    Args:
        x: [.., in]. scale: [out, groups]. bias: [out].
        zero_point: int8 [out, groups], or fp32 of the same shape where it trains or is no whole number.
        guard: looks whether Y stays as it is.

    Raises:
        ModelError: in the first backward, if it did not.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        own_bias = None if bias is None else bias.to(x.dtype)
        y: Tensor = _Product.apply(x, scale, zero_point, packed, own_bias, guard)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        packed: Packed,
        bias: Tensor | None,
        guard: KeptOutput | None,
    ) -> Tensor:
        stored = round_scale(scale, packed.spec)
        y = F.linear(x, _weight(packed, stored, zero_point, x.dtype), bias)
        _, trains_scale, trains_zero, *_ = ctx.needs_input_grad
        from_outputs = reads_outputs(packed, scale, trains_zero=trains_zero)
        kept = None if not (trains_scale or trains_zero) else y if from_outputs else x
        # A number a row is kept rounded: seven kernels less in the backward. Those of groups are too many to be kept.
        ctx.save_for_backward(kept, stored if from_outputs else scale, zero_point, bias)
        ctx.packed, ctx.from_outputs, ctx.keeps_output = packed, from_outputs, kept is y
        ctx.guard, ctx.looked = guard, guard.look(y) if guard and kept is y else None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, scale, zero_point, bias = ctx.saved_tensors
        stored = scale if ctx.from_outputs else round_scale(scale, ctx.packed.spec)
        dx = dscale = dzero = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _weight(ctx.packed, stored, zero_point, dy.dtype)
        if ctx.looked is not None:
            ctx.guard.check(kept, ctx.looked)
        if kept is not None and ctx.from_outputs:
            tiled = _tiled(ctx.packed, dy, dy.dtype)
            dscale = _from_outputs(dy.flatten(0, -2), kept.flatten(0, -2), bias, stored, tiled=tiled)
        elif kept is not None:
            trains_zero = ctx.needs_input_grad[2]
            dscale, dzero = range_gradients(dy, kept, ctx.packed, scale, zero_point, bias, trains_zero=trains_zero)
        dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None
        return dx, dscale, dzero, None, dbias, None


def reads_outputs(packed: Packed, scale: Tensor, *, trains_zero: bool) -> bool:
    """Whether the scale's gradient is read off the product's output, not off its input."""
    return scale.shape[1] == 1 and not trains_zero and packed.outlier_index is None


def range_gradients(
    dy: Tensor,
    kept: Tensor,
    packed: Packed,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *,
    trains_zero: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of scale and zero point [out, groups] from dY and what ``reads_outputs`` says: Y or X."""
    rows = dy.flatten(0, -2), kept.flatten(0, -2)
    if reads_outputs(packed, scale, trains_zero=trains_zero):
        stored = round_scale(scale, packed.spec)
        return _from_outputs(*rows, bias, stored, tiled=_tiled(packed, dy, dy.dtype)), None
    return _from_weight_gradient(*rows, packed, scale, zero_point, trains_zero)


def _from_outputs(dy: Tensor, y: Tensor, bias: Tensor | None, scale: Tensor, *, tiled: bool) -> Tensor:
    """sum_t dY Y / s [out, 1], Y before the bias, a share of the tokens at a time."""
    exact = torch.promote_types(dy.dtype, torch.float32)
    if tiled:
        return packed_tiles.output_sums(dy, y, bias).unsqueeze(1) / scale.to(exact)
    total = torch.zeros(dy.shape[1], dtype=exact, device=dy.device)
    step = max(1, CHUNK_BYTES // (8 * max(1, dy.shape[1])))
    for grads, outputs in zip(dy.split(step), y.split(step), strict=True):
        before = outputs.to(exact) if bias is None else outputs.to(exact) - bias.to(exact)
        total += (grads.to(exact) * before).sum(0)
    return (total.unsqueeze(1) / scale.to(exact)).to(torch.float32)


def _from_weight_gradient(
    dy: Tensor, x: Tensor, packed: Packed, scale: Tensor, zero_point: Tensor | None, trains_zero: bool
) -> tuple[Tensor, Tensor | None]:
    """Both gradients [out, groups] from G = dY^T X, some rows of G at a time.

    One kernel for both, which sums a tile of G over its groups in registers, is slower on an H200: 524 TFLOP/s beside
    590 of cuBLAS and a kernel that reads those rows again (11008 x 4096, int4 g128, 8,192 tokens).
    """
    spec, (out, groups) = packed.spec, scale.shape
    tiled = _tiled(packed, dy, dy.dtype)
    dscale = torch.empty(out, groups, device=dy.device)
    dzero = torch.empty_like(dscale) if trains_zero else None
    stored = _stored(zero_point, packed)
    rows = CHUNK_BYTES // (4 * packed.columns)
    # In whole tiles: from an odd place on, cuBLAS takes kernels of the generation before (of half the speed, H200).
    rows = rows // 128 * 128 or max(1, rows)
    for first in range(0, out, rows):
        part = slice(first, first + rows)
        gradient = _weight_gradient(dy[:, part], x)
        if packed.outlier_index is not None:
            _clear(gradient, packed.outlier_index, first * packed.columns)
        own = None if stored is None else stored[part]
        words = packed.words[part]
        if tiled:
            leveled, summed = packed_tiles.group_sums(
                gradient, words, spec.bits, groups, own, mid_rise=spec.mid_rise, sums=trains_zero
            )
        else:
            leveled, summed = _group_sums(gradient, words, spec, groups, own, sums=trains_zero)
        dscale[part] = leveled
        if dzero is not None and summed is not None:
            dzero[part] = -summed * round_scale(scale[part], spec).to(gradient.dtype)
    return dscale, dzero


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dY^T X in fp32 (or fp64); on a CPU the product's own rounding is that of its dtype."""
    if dy.is_cuda and dy.dtype in (torch.bfloat16, torch.float16) and x.dtype == dy.dtype:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return (dy.t() @ x).to(torch.promote_types(dy.dtype, torch.float32))


def _group_sums(
    gradient: Tensor, words: Tensor, spec: QuantSpec, groups: int, zero_point: Tensor | None, *, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """sum_{k in g} G (q - z) and, if asked, sum_{k in g} G, [out, groups] each."""
    levels = unpack(words, spec.bits, gradient.shape[1]).unflatten(1, (groups, -1)).to(gradient.dtype)
    gradient = gradient.unflatten(1, (groups, -1))
    if zero_point is not None:
        levels -= zero_point.unsqueeze(-1)
    elif spec.mid_rise:
        levels += 0.5
    return (gradient * levels).sum(-1), gradient.sum(-1) if sums else None


def _tiled(packed: Packed, tensor: Tensor, dtype: torch.dtype) -> bool:
    return packed.tiles and packed_tiles is not None and packed_tiles.fits(tensor, dtype)


def choose_tiles(asked: str, device: torch.device) -> tuple[bool, str]:
    """Whether the kernels in Triton are used, and why.

    Args:
        asked: ``auto``, ``plain`` or ``triton``. With them a step of the 7B takes 0.79 to 0.81 of the time (H200).
    """
    if asked == "plain":
        return False, "PyTorch's own operations"
    if packed_tiles is None or device.type != "cuda":
        return False, "PyTorch's own operations: those in Triton need " + ("a GPU" if packed_tiles else "Triton")
    return True, "Triton: dequantization, sums of scales' gradients"


def _clear(gradient: Tensor, index: Tensor, first: int) -> None:
    """Zero where an outlier stands: the scales have no part in it."""
    own = index[(index >= first) & (index < first + gradient.numel())].long() - first
    gradient.view(-1)[own] = 0


def _stored(zero_point: Tensor | None, packed: Packed) -> Tensor | None:
    if zero_point is None or zero_point.dtype == torch.int8:
        return zero_point
    if not packed.whole_zero_points:
        return zero_point.detach()
    return zero_point.detach().round().clamp(packed.spec.quant_min, packed.spec.quant_max).to(torch.int8)
