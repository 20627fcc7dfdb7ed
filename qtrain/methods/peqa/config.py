"""The keys of `method.name=peqa`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from qtrain.methods.packed.config import PackedOptions


class PeqaOptions(PackedOptions):
    """Scales alone are trained, over packed integers (Kim 2023, arXiv 2305.14152)."""

    implementation: ClassVar[str] = "qtrain.methods.peqa.method:Peqa"

    name: str = Field("peqa", description="what is quantized and what trains")
    zero_points: bool = Field(
        False, description="train zero points too, rounded in the product (needs method.weight.symmetric=false)"
    )
    zero_point_lr: float | None = Field(None, gt=0, description="their learning rate, in codes; default: optimizer.lr")
