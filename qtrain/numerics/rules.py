"""Fake quantization as pairs of pure functions: numbers forward, and what the backward makes of their gradient.

A straight-through backward is not the derivative of its forward: round(u) counts as u + (round(u0) - u0) with the
bracket constant (Bengio 2013, arXiv 1308.3432). A backward needs nothing but the inputs of the forward, so nothing is
saved that a caller does not hold already.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from qtrain.numerics.affine import QParams, dynamic_qparams, grouped, level_codes, level_numbers, round_scale
from qtrain.numerics.affine import round_zero_point as _round_zero_point
from qtrain.numerics.spec import QuantSpec

SEQ_EDGE = 0.99
"""ParetoQ clips at .99 a, just inside the outermost cell's edge, so that no code is rounded past the last level."""


class Gradients(NamedTuple):
    """Of x, of the scale (or PACT's bound) and of the offset; None where it was not asked for."""

    x: Tensor | None
    scale: Tensor | None = None
    offset: Tensor | None = None


RULES: dict[str, Rule] = {}
"""Every rule there is by its key: compiled code hands strings to its operations, not objects."""


@dataclass(frozen=True)
class Rule(ABC):
    """How x is fake-quantized and how gradients pass.

    Attributes:
        spec: what x becomes.
        key: its name in ``RULES``; equal rules have equal keys.
    """

    spec: QuantSpec
    key: str = field(init=False, repr=False, compare=False)

    identity: ClassVar[bool] = False
    """The backward passes x's gradient on unchanged, and needs nothing for it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", repr(self))
        RULES[self.key] = self

    @abstractmethod
    def qparams(self, x: Tensor, scale: Tensor | None, offset: Tensor | None) -> QParams:
        """Scale and zero point as they are stored, of x or of what was learned or calibrated."""

    @abstractmethod
    def backward(
        self, x: Tensor, scale: Tensor | None, offset: Tensor | None, gradient: Tensor, needs: tuple[bool, bool, bool]
    ) -> Gradients:
        """Gradients of (x, scale, offset) from that of the fake-quantized x."""

    def forward(self, x: Tensor, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
        """x on its levels: (clamp(round(x / s) + z) - z) s, in x's shape and dtype."""
        qparams = self.qparams(x, scale, offset)
        codes = level_codes(grouped(x, self.spec), qparams, self.spec)
        return level_numbers(codes, qparams, self.spec, x.dtype).reshape(x.shape)


class Dynamic(Rule):
    """The tensor's own extremes. Nothing clips, so the backward is the identity, by definition.

    Where a rounded scale or a convention clamps the largest code, the gradient is not masked: torchao's absmax / 7.5
    leaves the largest weight of 80 % of its groups without a gradient.
    """

    identity: ClassVar[bool] = True

    def qparams(self, x: Tensor, scale: Tensor | None, offset: Tensor | None) -> QParams:
        """Of x."""
        return dynamic_qparams(x, self.spec)

    def backward(
        self, x: Tensor, scale: Tensor | None, offset: Tensor | None, gradient: Tensor, needs: tuple[bool, bool, bool]
    ) -> Gradients:
        """The gradient itself."""
        return Gradients(gradient)


class CompatibleLLMQAT(Dynamic):
    """As ``Dynamic``, with the backward of LLM-QAT's source: no gradient where |x| >= 2, though nothing clips there."""

    identity: ClassVar[bool] = False

    def backward(
        self, x: Tensor, scale: Tensor | None, offset: Tensor | None, gradient: Tensor, needs: tuple[bool, bool, bool]
    ) -> Gradients:
        """gradient * 1[|x| < 2]."""
        return Gradients(gradient * (x.abs() < 2))


class Learned(Rule):
    """LSQ (Esser 2020, arXiv 1902.08153), LSQ+ (Bhalgat 2020, arXiv 2004.09576), SEQ and elastic binary (ParetoQ,
    Liu 2025, arXiv 2502.02631; BiT, Liu 2022, arXiv 2205.13016).

    With u = x / s and n = q - z the level in units of s: dx = 1 inside, 0 outside; ds = n - u inside, n - offset / s
    outside; d offset = 0 inside, 1 outside. ds and d offset are scaled by 1 / sqrt(N quant_max), N the numbers that
    share s.
    Inside is where u lies between the outermost levels; for SEQ (mid_rise, ternary) within 0.99 of the outermost
    cells' edges; for binary |u| <= 1, and ds = sign(x) everywhere.
    """

    def qparams(self, x: Tensor, scale: Tensor | None, offset: Tensor | None) -> QParams:
        """The master scale as stored, and z = round(-offset / s)."""
        assert scale is not None
        stored = round_scale(scale.to(torch.float32), self.spec)
        return QParams(stored, None if offset is None else _round_zero_point(offset, stored, self.spec))

    def backward(
        self, x: Tensor, scale: Tensor | None, offset: Tensor | None, gradient: Tensor, needs: tuple[bool, bool, bool]
    ) -> Gradients:
        """Rounding of the scale to its storage passes gradients straight through."""
        spec, qparams = self.spec, self.qparams(x, scale, offset)
        groups = grouped(x, spec)
        upper = grouped(gradient, spec)
        u = groups / qparams.scale.to(torch.float32).unsqueeze(-1)
        low, high = self.edges()
        zero, free = self._zero(qparams, offset)
        inside = (u >= low - zero) & (u <= high - zero)
        d_x = (upper * inside).reshape(x.shape).to(x.dtype) if needs[0] else None
        d_scale = d_offset = None
        factor = 1.0 / math.sqrt(groups.shape[-1] * spec.quant_max)
        if needs[1]:
            levels = level_codes(groups, qparams, spec)
            moved: Tensor | float = 0.0
            if offset is not None:
                # z = round(-offset / s) moves with s: outside the level counts from the offset, not from zero.
                levels -= zero
                moved = (offset / qparams.scale * free).unsqueeze(-1)
            elif spec.mid_rise:
                levels += 0.5
            if spec.format != "binary":
                levels = torch.where(inside, levels - u, levels - moved)
            d_scale = (levels * upper).sum(dim=-1) * factor
        if needs[2]:
            d_offset = (upper * ~inside).sum(dim=-1) * factor * free
        return Gradients(d_x, d_scale, d_offset)

    def _zero(self, qparams: QParams, offset: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """z [rows, groups, 1], and 1 where it follows the offset, 0 where it is held at the end of the codes' range."""
        if qparams.zero_point is None or offset is None:
            return 0.0, 1.0
        wanted = (-offset / qparams.scale.to(torch.float32)).round_() + self.spec.quant_min
        free = (wanted >= self.spec.quant_min) & (wanted <= self.spec.quant_max)
        return qparams.zero_point.to(torch.float32).unsqueeze(-1), free.to(torch.float32)

    def edges(self) -> tuple[float, float]:
        """Lowest and highest code, in units of s, between which x counts as inside."""
        spec = self.spec
        if spec.mid_rise:
            return SEQ_EDGE * spec.quant_min, -SEQ_EDGE * spec.quant_min
        if spec.format == "ternary":
            return -SEQ_EDGE * 1.5, SEQ_EDGE * 1.5
        return float(-spec.quant_max if spec.format == "binary" else spec.quant_min), float(spec.quant_max)


class Static(Learned):
    """A calibrated range that stays: as ``Learned`` in x, nothing learned."""

    def backward(
        self, x: Tensor, scale: Tensor | None, offset: Tensor | None, gradient: Tensor, needs: tuple[bool, bool, bool]
    ) -> Gradients:
        """dx = 1 inside the range, 0 outside."""
        return super().backward(x, scale, offset, gradient, (needs[0], False, False))


class Pact(Rule):
    """PACT (Choi 2018, arXiv 1805.06085): y = clip(x, 0, a), on 2^b - 1 steps of a / (2^b - 1); signed: clip(x, -a, a).

    dy/da = 1[x >= a] (signed: - 1[x <= -a]); dy/dx = 1[0 <= x < a]. What the rounding moves counts for neither. A
    symmetric spec is signed, an asymmetric one unsigned. ``scale`` is a, one number.
    """

    def qparams(self, x: Tensor, scale: Tensor | None, offset: Tensor | None) -> QParams:
        """s = a / (2^b - 1) and z = quant_min; signed: s = a / (2^(b-1) - 1)."""
        assert scale is not None
        bound = scale.to(torch.float32)
        if self.spec.symmetric:
            return QParams(round_scale(bound / self.spec.quant_max, self.spec))
        stored = round_scale(bound / (self.spec.quant_max - self.spec.quant_min), self.spec)
        return QParams(stored, torch.full_like(stored, self.spec.quant_min, dtype=torch.int8))

    def backward(
        self, x: Tensor, scale: Tensor | None, offset: Tensor | None, gradient: Tensor, needs: tuple[bool, bool, bool]
    ) -> Gradients:
        """The paper's."""
        assert scale is not None
        groups, upper = grouped(x, self.spec), grouped(gradient, self.spec)
        bound = scale.to(torch.float32).unsqueeze(-1)
        above = groups >= bound
        below = groups <= -bound if self.spec.symmetric else groups < 0
        d_x = upper.masked_fill(above | below, 0.0).reshape(x.shape).to(x.dtype) if needs[0] else None
        d_bound = None
        if needs[1]:
            pushed = upper.masked_fill(~above, 0.0).sum(dim=-1)
            d_bound = pushed - upper.masked_fill(~below, 0.0).sum(dim=-1) if self.spec.symmetric else pushed
        return Gradients(d_x, d_bound)
