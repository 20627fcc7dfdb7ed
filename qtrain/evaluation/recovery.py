"""What quantization-aware training gives back of what quantization took."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Recovery:
    """Perplexities of the same held-out text.

    Attributes:
        full: before quantization.
        ptq: the same spec by absmax and rounding to nearest, untrained.
        qat: after the training.
    """

    full: float
    ptq: float
    qat: float

    @property
    def share(self) -> float | None:
        """1 - ln(qat / full) / ln(ptq / full): 1 is all, 0 nothing, below 0 worse than without training.

        None where rounding to nearest costs nothing, so that there is nothing to recover.
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
            f"the trained model ({self.qat:.2f}) is worse than plain rounding to nearest ({self.ptq:.2f}): "
            "a lower optimizer.lr, distill.loss=forward_kl, or training text nearer to the held-out text"
        )

    def rows(self) -> list[tuple[str, str]]:
        """Names and figures, for a table."""
        share = self.share
        return [
            ("full precision", f"{self.full:.3f}"),
            ("PTQ (round to nearest)", f"{self.ptq:.3f}"),
            ("QAT", f"{self.qat:.3f}"),
            ("share recovered", "nothing was lost" if share is None else f"{share:.1%}"),
        ]

    def to_dict(self) -> dict[str, float | None]:
        """The figures and the share, as JSON takes them."""
        return asdict(self) | {"share": self.share}
