"""`method.init` and the keys of each starting point."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from qtrain.section import Section


class StartSection(Section):
    """Options of one starting point."""

    implementation: ClassVar[str]
    """``package.module:attribute`` of the Start subclass, imported when it runs."""
    needs_text: ClassVar[bool] = False
    """Whether it looks at what flows into the layers."""


class RtnSection(StartSection):
    """Each group's extremes, each weight to its nearest code."""

    implementation: ClassVar[str] = "qtrain.ptq.rtn:Rtn"


class MseSection(StartSection):
    """The range with the least squared error, each weight to its nearest code."""

    implementation: ClassVar[str] = "qtrain.ptq.mse:Mse"


class HqqSection(StartSection):
    """Half-quadratic quantization: zero points that leave a sparse error; no text (Badri and Shaji 2023)."""

    implementation: ClassVar[str] = "qtrain.ptq.hqq:Hqq"

    steps: int = Field(20, ge=1, description="alternations of shrinkage and zero point")
    p: float = Field(0.7, gt=0, le=1, description="norm of the error that is made small; below 1 it favours outliers")


class AwqSection(StartSection):
    """Input channels that carry large numbers get larger weights before rounding (Lin 2023, arXiv 2306.00978)."""

    implementation: ClassVar[str] = "qtrain.ptq.awq:Awq"
    needs_text: ClassVar[bool] = True

    grid: int = Field(20, ge=1, description="exponents tried, from 0 up to 1")
    clip: bool = Field(True, description="search each group's range too")


class GptqSection(StartSection):
    """Rounding with error feedback over correlated inputs (Frantar 2022, arXiv 2210.17323)."""

    implementation: ClassVar[str] = "qtrain.ptq.gptq:Gptq"
    needs_text: ClassVar[bool] = True

    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, as a share of its mean")
    order: Literal["activation", "given"] = Field(
        "activation", description="columns with the largest inputs first; scales stay by position, so g_idx is plain"
    )
    scales: Literal["mse", "absmax"] = Field(
        "mse", description="least weighted squared error, or each group's extremes"
    )


class SmoothQuantSection(StartSection):
    """Outliers of the inputs move into the weights (Xiao 2022, arXiv 2211.10438)."""

    implementation: ClassVar[str] = "qtrain.ptq.smoothquant:SmoothQuant"
    needs_text: ClassVar[bool] = True

    alpha: float = Field(0.5, ge=0, le=1, description="share of the difficulty that moves: s = max|X|^a / max|W|^(1-a)")


class SpqrSection(StartSection):
    """A few sensitive weights stay in 16 bits, the rest by GPTQ (Dettmers 2023, arXiv 2306.03078)."""

    implementation: ClassVar[str] = "qtrain.ptq.spqr:Spqr"
    needs_text: ClassVar[bool] = True

    outliers: float = Field(0.01, gt=0, lt=0.5, description="share of the weights that stay in 16 bits")
    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, as a share of its mean")


class BlockApSection(StartSection):
    """Weights, scales and zero points of one block after the other learn what the full-precision block gives:
    Block-AP, the first half of EfficientQAT (Chen 2024, arXiv 2407.11062).

    Not one layer at a time as the others, so what runs is a function over the whole model.
    """

    implementation: ClassVar[str] = "qtrain.ptq.block_ap:block_ap"
    needs_text: ClassVar[bool] = True

    start: Literal["mse", "gptq"] = Field(
        "gptq", description="codes that each block begins at, and keeps where training does not better them"
    )
    rows: int = Field(4096, ge=1, description="rows of training text; the paper's have 2048 tokens")
    epochs: int = Field(2, ge=1, description="passes of each block over them")
    batch_size: int = Field(2, ge=1, description="rows in a step")
    weight_lr: float | None = Field(
        None,
        gt=0,
        description="of Adam for weights; default: the paper's for thousands of steps, 2e-5 at 2 bits, else 1e-5; for "
        "tens of steps 3e-4",
    )
    range_lr: float = Field(1e-4, gt=0, description="of Adam for scales and zero points")
    validation: float = Field(
        0.05, ge=0, lt=1, description="share of the rows that a block does not train on; its error is measured there"
    )


STARTS: dict[str, type[StartSection]] = {
    "rtn": RtnSection,
    "mse": MseSection,
    "hqq": HqqSection,
    "awq": AwqSection,
    "gptq": GptqSection,
    "smoothquant": SmoothQuantSection,
    "spqr": SpqrSection,
    "block_ap": BlockApSection,
}
