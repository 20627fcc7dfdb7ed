"""The one that decides the codes: training, evaluation and export all ask it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.kernels.fake_quantize import fake_quantize
from qtrain.modules.config import QuantizerSection
from qtrain.numerics.affine import QParams, choose_qparams, dequantize, grouped, qparams_of_bounds, quantize
from qtrain.numerics.observers.observer import Observer
from qtrain.numerics.observers.registry import OBSERVERS
from qtrain.numerics.ranges import search_qparams
from qtrain.numerics.rules import Dynamic, Learned, Pact, Rule, Static
from qtrain.numerics.spec import QuantSpec

RULES: dict[str, type[Rule]] = {"dynamic": Dynamic, "static": Static, "learned": Learned, "pact": Pact}


class Quantizer(nn.Module):
    """x on its levels, with a straight-through gradient: x_q = (clamp(round(x / s) + z) - z) s.

    Learned scales (``scale``, ``offset``; ``alpha`` of PACT) are fp32 parameters from construction, static ones are
    buffers; both are rounded as they will be stored each time they are used. Without its start a range is NaN, and
    using it is an error.

    Args:
        section: what x becomes, and where the range comes from.
        weight: the weight it is for; None: an activation, whose ranges hold for the whole tensor.

    Attributes:
        enabled: False hands x through untouched.
        observer: where one is set, x is looked at and handed through.
    """

    scale: Tensor | None
    offset: Tensor | None

    def __init__(self, section: QuantizerSection, weight: Tensor | None = None) -> None:
        super().__init__()
        self.section = section
        self.for_weight = weight is not None
        self.spec = section.spec(weight=self.for_weight)
        self.rule = RULES[section.range](self.spec)
        self.enabled = True
        self.ready = section.range == "dynamic"
        self.observer: Observer | None = None
        shape = (1, 1) if weight is None else tuple(grouped(weight.detach(), self.spec).shape[:2])
        if section.range == "dynamic":
            return
        if weight is None and self.spec.granularity != "per_tensor":
            raise ModelError(
                f"granularity={self.spec.granularity} with range={section.range} for an activation",
                rule="what is kept for an activation is one range: its rows are other ones each time",
                fix="granularity=per_tensor, or range=dynamic",
            )
        device = None if weight is None else weight.device
        empty = torch.full(shape, math.nan, device=device)
        learned = section.range in ("learned", "pact")
        for name in (
            ("alpha",) if section.range == "pact" else ("scale",) if self.spec.symmetric else ("scale", "offset")
        ):
            if learned:
                self.register_parameter(name, nn.Parameter(empty.clone()))
            else:
                self.register_buffer(name, empty.clone())
        if section.range == "pact":
            self._set(scale=torch.full(shape, section.pact_alpha))
        elif section.bounds is not None:
            low, high = section.known_bounds()
            self._set_bounds(torch.full(shape, low), torch.full(shape, high))
        elif weight is not None and not weight.is_meta:
            self.start(weight.detach())

    @property
    def learns(self) -> bool:
        """Whether it has parameters."""
        return any(True for _ in self.parameters(recurse=False))

    def range_tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """(scale or PACT's alpha, offset), None where the range is dynamic or symmetric."""
        # Asked for in every forward: through nn.Module's own look-up, absent names cost 4 us each.
        kept = self._parameters or self._buffers
        return kept.get("alpha" if self.section.range == "pact" else "scale"), kept.get("offset")

    def forward(self, x: Tensor) -> Tensor:
        """x on its levels, in x's shape and dtype."""
        if self.observer is not None:
            self._observe(x)
            return x
        if not self.enabled:
            return x
        self.check_ready()
        return fake_quantize(x, self.rule, *self.range_tensors())

    def qparams(self, x: Tensor) -> QParams:
        """Scale and zero point as stored; of x where the range is dynamic."""
        self.check_ready()
        with torch.no_grad():
            return self.rule.qparams(x.detach(), *self.range_tensors())

    def stored(self) -> QParams:
        """Scale and zero point of a range that is kept."""
        self.check_ready()
        scale, _ = self.range_tensors()
        assert scale is not None  # a dynamic range keeps nothing
        return self.rule.qparams(scale.new_zeros(1, 1), *self.range_tensors())

    def set(self, qparams: QParams) -> None:
        """Take a range that was found elsewhere."""
        self._set(qparams)

    def codes(self, x: Tensor) -> tuple[Tensor, QParams]:
        """The codes (int8, or float8) of x's shape that ``forward`` uses, and what maps them back."""
        qparams = self.qparams(x)
        return quantize(x.detach(), qparams, self.spec), qparams

    def dequantize(self, codes: Tensor, qparams: QParams, dtype: torch.dtype = torch.float32) -> Tensor:
        """What ``forward`` gave for these codes."""
        return dequantize(codes, qparams, self.spec, dtype)

    def start(self, x: Tensor, importance: Tensor | None = None) -> None:
        """Set the range by ``section.calibrate`` from a weight.

        Args:
            importance: E[a_j^2] [in] of the input, to weigh the search with.
        """
        calibrate = self.section.calibrate
        if calibrate == "lsq":
            scale = 2 * grouped(x, self.spec).abs().mean(dim=-1) / math.sqrt(self.spec.quant_max)
            self._set(QParams(scale.clamp(min=2.0**-14)))
        elif calibrate == "mse":
            self._set(search_qparams(x, self.spec, importance))
        elif calibrate == "min_max":
            self._set(choose_qparams(x, self.spec))
        else:
            groups = grouped(x, self.spec)
            observer = self._new_observer(groups.shape[0] * groups.shape[1])
            observer.update(groups.flatten(0, 1))
            low, high = (bound.reshape(groups.shape[:2]) for bound in observer.bounds())
            self._set_bounds(low, high)

    def observe(self) -> None:
        """Hand x through and look at it, until ``settle``."""
        if self.section.range != "dynamic" and self.section.bounds is None:
            self.observer = self._new_observer(1)

    def settle(self) -> None:
        """Set the range from what was observed.

        Raises:
            ModelError: nothing was.
        """
        if self.observer is None:
            return
        observer, self.observer = self.observer, None
        low, high = (bound.reshape(1, 1) for bound in observer.bounds())
        if self.section.range == "pact":
            self._set(scale=torch.maximum(low.abs(), high.abs()) if self.spec.symmetric else high)
        else:
            self._set_bounds(low, high)

    def change_format(self, name: str) -> None:
        """Another number of bits from here on; learned and static ranges keep their width."""
        before = self.spec
        self.section = self.section.merged({"format": name})
        self.spec = self.section.spec(weight=self.for_weight)
        self.rule = RULES[self.section.range](self.spec)
        scale, _ = self.range_tensors()
        if scale is not None and self.section.range != "pact":  # alpha is a bound, not a step
            with torch.no_grad():
                scale.mul_(_width(before) / _width(self.spec))

    def check_ready(self) -> None:
        """Raise unless there is a range.

        Raises:
            ModelError: a static or learned range that was neither calibrated nor loaded.
        """
        if not self.ready:
            raise ModelError(
                f"this quantizer ({self.section.range} range) has no range yet",
                rule="static and learned ranges of activations are calibrated before they are used",
                fix="run calibration batches first: qtrain.modules.calibrate.calibrate(model, batches)",
            )

    def extra_repr(self) -> str:
        """The format, who shares a scale, and the range."""
        size = f"({self.spec.group_size})" if self.spec.group_size else ""
        kind = "symmetric" if self.spec.symmetric else "asymmetric"
        return f"{self.spec.format}, {kind}, {self.spec.granularity}{size}, {self.section.range}"

    def _new_observer(self, groups: int) -> Observer:
        name = self.section.calibrate
        name = "mse" if name == "lsq" else name
        return OBSERVERS.get(name)(bits=self.spec.bits, symmetric=self.spec.symmetric, groups=groups)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        assert self.observer is not None
        self.observer.update(x.detach().reshape(1, -1))

    def _set_bounds(self, low: Tensor, high: Tensor) -> None:
        self._set(qparams_of_bounds(low, high, self.spec))

    @torch.no_grad()
    def _set(self, qparams: QParams | None = None, *, scale: Tensor | None = None) -> None:
        own_scale, own_offset = self.range_tensors()
        assert own_scale is not None
        if qparams is not None:
            scale = qparams.scale.to(torch.float32)
            if own_offset is not None:
                zero_point = qparams.zero_point
                assert zero_point is not None
                own_offset.copy_((self.spec.quant_min - zero_point.to(torch.float32)) * scale)
        assert scale is not None
        own_scale.copy_(scale)
        self.ready = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move ranges as asked, but keep them in fp32: in bf16 a step below 0.4 % of a scale is lost."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        scale, _ = self.range_tensors()
        if scale is not None and not scale.is_meta:
            self.ready = bool(scale.isfinite().all())


def _width(spec: QuantSpec) -> float:
    """The range in steps."""
    return spec.reach if spec.symmetric else float(spec.quant_max - spec.quant_min)
