"""What quantization-aware training gives back of what quantization took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Recovery:
    """Perplexities of the same held-out text.

    Attributes:
        full: before quantization.
        ptq: the same spec untrained, by absmax and rounding to nearest, or as the starting point chose.
        qat: after the training.
        start: the starting point, where the training began at one.
    """

    measure: ClassVar[str] = "perplexity, held-out text"
    note: ClassVar[str | None] = None

    full: float
    ptq: float
    qat: float
    start: str | None = None

    @property
    def share(self) -> float | None:
        """1 - ln(qat / full) / ln(ptq / full): 1 is all, 0 nothing, below 0 worse than without training.

        None where quantization alone costs nothing, so that there is nothing to recover.
        """
        if not all(math.isfinite(value) and value > 0 for value in (self.full, self.ptq, self.qat)):
            return None
        lost = math.log(self.ptq / self.full)
        return None if lost <= 0 else 1 - math.log(self.qat / self.full) / lost

    @property
    def warning(self) -> str | None:
        """Told where the training did harm."""
        if self.qat <= self.ptq:
            return None
        return (
            f"the trained model ({self.qat:.2f}) is worse than {self.start or 'plain rounding to nearest'} "
            f"({self.ptq:.2f}): a lower optimizer.lr, distill.loss=forward_kl, "
            "or training text nearer to the held-out text"
        )

    def rows(self) -> list[tuple[str, str]]:
        """Names and figures, for a table."""
        share = self.share
        return [
            ("full precision", f"{self.full:.3f}"),
            (f"PTQ ({self.start or 'round to nearest'})", f"{self.ptq:.3f}"),
            ("QAT", f"{self.qat:.3f}"),
            ("share recovered", "nothing was lost" if share is None else f"{share:.1%}"),
        ]

    def to_dict(self) -> dict[str, float | None]:
        """The figures and the share, as JSON takes them."""
        return {"full": self.full, "ptq": self.ptq, "qat": self.qat, "share": self.share}


@dataclass(frozen=True)
class AccuracyRecovery:
    """Accuracies, 0 to 1, on the same images.

    Attributes:
        full, ptq: of the weights that training began with, as they were and by absmax and rounding to nearest; None
            where they were random.
        qat: after the training.
    """

    measure: ClassVar[str] = "accuracy, test images"

    full: float | None
    ptq: float | None
    qat: float

    @property
    def share(self) -> float | None:
        """1 - (full - qat) / (full - ptq): above 1 where the training went on to more than it began with.

        None where there is nothing to recover.
        """
        if self.full is None or self.ptq is None or self.ptq >= self.full:
            return None
        return 1 - (self.full - self.qat) / (self.full - self.ptq)

    @property
    def warning(self) -> str | None:
        """Told where the training did harm."""
        if self.ptq is None or self.qat >= self.ptq:
            return None
        return (
            f"the trained network ({self.qat:.2%}) is worse than plain rounding to nearest ({self.ptq:.2%}): "
            "a lower optimizer.lr, or more epochs"
        )

    @property
    def note(self) -> str | None:
        """Why figures are missing, and how to have them."""
        if self.full is not None:
            return None
        return (
            "Trained from random weights: there was nothing to round to nearest. method.name=none run.name=TWIN "
            "trains the full-precision twin; model.weights=runs/TWIN starts from it and completes this table."
        )

    def rows(self) -> list[tuple[str, str]]:
        """Names and figures, for a table."""
        full, ptq = ("–" if value is None else f"{value:.2%}" for value in (self.full, self.ptq))
        rows = [("full precision", full), ("PTQ (round to nearest)", ptq), ("QAT", f"{self.qat:.2%}")]
        if self.full is None:
            return rows
        return [*rows, ("share recovered", "nothing was lost" if self.share is None else f"{self.share:.1%}")]

    def to_dict(self) -> dict[str, float | None]:
        """The figures and the share, as JSON takes them."""
        return asdict(self) | {"share": self.share}


def recovery_of(figures: Mapping[str, Any]) -> Recovery | AccuracyRecovery | None:
    """What fit.json tells; None for a run that quantized nothing or measured nothing."""
    found = figures.get("recovery")
    if not found:
        return None
    if "test_accuracy" in figures:
        return AccuracyRecovery(found["full"], found["ptq"], found["qat"])
    return Recovery(found["full"], found["ptq"], found["qat"], figures.get("init"))
