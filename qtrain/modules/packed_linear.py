"""A linear layer that holds its weight as packed integers: what PEQA trains the scales of, and adapters sit on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.kernels.kept_output import KeptOutput
from qtrain.kernels.packed_linear import Packed, packed_linear, packed_weight
from qtrain.modules.config import QuantizerSection
from qtrain.modules.quantizer import Quantizer
from qtrain.modules.record import LinearRecord, Outliers
from qtrain.numerics.affine import SCALE_DTYPES, round_scale
from qtrain.numerics.packing import PACKED_BITS, pack, unpack
from qtrain.numerics.spec import QuantSpec


class PackedLinear(nn.Linear):
    """y = fq(x) ((q - z) s)^T + b: q and z frozen in ``spec.bits`` bits each, s in 16 bits, or in fp32 where it trains.

    Made by ``from_record``. As bitsandbytes' layers are, it is an ``nn.Linear`` whose ``weight`` is the packed tensor.

    Attributes:
        weight: int32 [out, in * bits / 32].
        scale: [out, groups].
        zero_point: int32 words of the base's zero points in a row; fp32 [out, groups] where they are no whole numbers,
            as HQQ stores them; None where the spec is symmetric.
        zero: fp32 [out, groups], in their place where zero points train or were trained, else None.
        outlier_index, outlier_value: weights that the codes do not hold, or None.
        input_quantizer: None leaves inputs as they are.
        tiles: let the kernels in Triton do what they know.
        guard: looks whether outputs that are kept stay as they are.
    """

    tiles = False
    guard: KeptOutput
    spec: QuantSpec
    scale: nn.Parameter
    zero: nn.Parameter | None
    zero_point: Tensor | None
    outlier_index: Tensor | None
    outlier_value: Tensor | None
    input_quantizer: Quantizer | None

    @classmethod
    def from_record(
        cls, record: LinearRecord, bias: Tensor | None = None, activation: QuantizerSection | None = None
    ) -> Self:
        """A layer with these codes, on their device; all of it frozen.

        Raises:
            ModelError: codes that no word holds (binary, fp8).
        """
        spec = record.spec
        if spec.is_float or spec.bits not in PACKED_BITS:
            raise ModelError(
                f"{spec.format} codes in a packed layer",
                rule="packed weights are int2 .. int8 or ternary",
                fix="method.weight.format=int4",
            )
        out, columns = record.codes.shape
        layer = cls(columns, out, bias is not None, device="meta")
        layer.spec, layer.guard = spec, KeptOutput()
        layer.weight = nn.Parameter(pack(record.codes, spec.bits), requires_grad=False)
        layer.scale = nn.Parameter(record.scale.to(SCALE_DTYPES[spec.scale_dtype]).contiguous(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        layer.register_buffer("zero_point", _stored_zero_points(record))
        layer.register_parameter("zero", None)
        layer.register_buffer("outlier_index", None if record.outliers is None else record.outliers.index)
        layer.register_buffer("outlier_value", None if record.outliers is None else record.outliers.value)
        layer.input_quantizer = None if activation is None else Quantizer(activation).to(record.codes.device)
        return layer

    def train_ranges(self, *, zero_points: bool = False) -> None:
        """Let the scales train, in fp32 (in bf16 an update below 0.4 % is lost); zero points too if asked."""
        self.scale = nn.Parameter(self.scale.detach().to(torch.float32))
        if zero_points and self.zero_point is not None:
            points = self._zero_points()
            assert points is not None
            self.zero = nn.Parameter(points.to(torch.float32, copy=True))

    @torch.no_grad()
    def set_ranges(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Take other scales [out, groups], and other zero points; without them those of the base are back."""
        self.scale.copy_(scale)
        if zero_point is not None and self.zero is None:
            self.zero = nn.Parameter(zero_point.to(self.scale.device, torch.float32), requires_grad=False)
        elif self.zero is not None:
            points = self._base_zero_points() if zero_point is None else zero_point
            assert points is not None
            self.zero.copy_(points)

    def forward(self, input: Tensor) -> Tensor:
        """y [.., out] of x [.., in]."""
        if self.input_quantizer is not None:
            if torch.is_autocast_enabled(input.device.type):  # levels of the dtype that is multiplied
                input = input.to(torch.get_autocast_dtype(input.device.type))
            input = self.input_quantizer(input)
        return packed_linear(input, *self.product_arguments(), self.guard)

    def product_arguments(self) -> tuple[Packed, Tensor, Tensor | None, Tensor | None]:
        """Codes, scale, zero point and bias, as the product takes them."""
        return self.packed, self.scale, self._zero_points(), self.bias

    @property
    def packed(self) -> Packed:
        """What does not train."""
        outliers = self.outlier_index, self.outlier_value
        return Packed(self.weight, self.in_features, self.spec, *outliers, self.whole_zero_points, self.tiles)

    @property
    def whole_zero_points(self) -> bool:
        """Whether zero points are integers, or there are none; no integer kernel takes others."""
        return self.zero_point is None or not self.zero_point.is_floating_point()

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [out, in] as the product in ``dtype`` sees it."""
        return packed_weight(self.packed, self.scale.detach(), self._zero_points(), dtype)

    @property
    def W_q(self) -> Tensor:
        """The words under HQQ's name: PEFT's DoRA (0.21) asks a layer that has it for ``dequantize()``, and takes the
        ``weight`` of any other that is not bitsandbytes' for numbers.
        """
        return self.weight

    def dequantize(self) -> Tensor:
        """``dense_weight`` in fp32, under HQQ's name."""
        return self.dense_weight()

    @torch.no_grad()
    def record(self) -> LinearRecord:
        """Codes, and scales and zero points as they are stored by now."""
        codes = unpack(self.weight, self.spec.bits, self.in_features)
        outliers = None
        if self.outlier_index is not None and self.outlier_value is not None:
            outliers = Outliers(self.outlier_index, self.outlier_value)
        quantizer = self.input_quantizer
        inputs = None if quantizer is None or quantizer.section.range == "dynamic" else quantizer.stored()
        return LinearRecord(codes, self.stored_scale(), self.stored_zero_point(), self.spec, outliers, inputs)

    @torch.no_grad()
    def stored_scale(self) -> Tensor:
        """The scale [out, groups] that is multiplied, in the spec's scale_dtype."""
        return round_scale(self.scale.detach(), self.spec)

    @torch.no_grad()
    def stored_zero_point(self) -> Tensor | None:
        """The zero point [out, groups] that is subtracted: int8, or fp32 where the base has fractions, or None."""
        points = self._zero_points()
        if points is None or points.dtype == torch.int8 or not self.whole_zero_points:
            return None if points is None else points.detach()
        return points.round().clamp(self.spec.quant_min, self.spec.quant_max).to(torch.int8)

    def stored_bytes(self) -> int:
        """Bytes of this layer in a checkpoint: words, 16-bit scales, zero points, outliers, bias."""
        parts = [self.weight, self.zero_point, self.outlier_index, self.outlier_value, self.bias]
        ranges = self.scale.numel() * SCALE_DTYPES[self.spec.scale_dtype].itemsize
        return ranges + sum(part.nbytes for part in parts if part is not None)

    def extra_repr(self) -> str:
        """Widths and the spec."""
        spec = self.spec
        size = f"({spec.group_size})" if spec.group_size else ""
        kind = "symmetric" if spec.symmetric else "asymmetric"
        kind += "" if self.whole_zero_points else " (fractional zero points)"
        return f"{self.in_features}, {self.out_features}, {spec.format} {kind} {spec.granularity}{size}"

    def _zero_points(self) -> Tensor | None:
        return self._base_zero_points() if self.zero is None else self.zero

    def _base_zero_points(self) -> Tensor | None:
        if self.zero_point is None or self.zero_point.is_floating_point():
            return self.zero_point
        return unpack(self.zero_point, self.spec.bits, self.scale.numel()).view(self.scale.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as asked, but keep the dtype of ranges and outliers: they are rounded as they are stored."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            own = any(tensor is part for part in (self.scale, self.zero, self.zero_point, self.outlier_value))
            return moved if moved.dtype == tensor.dtype or not own else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def _stored_zero_points(record: LinearRecord) -> Tensor | None:
    points = record.zero_point
    if points is None or points.is_floating_point():
        return None if points is None else points.to(torch.float32).contiguous()
    return pack(points.reshape(1, -1), record.spec.bits)
