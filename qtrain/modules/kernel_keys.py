"""Which arithmetic a fake-quantized layer trains with, by the names of the keys."""

from __future__ import annotations

from typing import Literal

Kernels = Literal["plain", "triton", "int8", "fp8"]
"""plain: levels by PyTorch's operations, multiplied as floats. triton: levels by one-pass kernels where there is a GPU.
int8, fp8: codes of that kind multiplied as they are where a layer's specs allow it, else as triton."""
AUTO: Kernels = "triton"
"""What ``auto`` is without a GPU: there products of bytes are slower than those of floats, or not exact."""
AUTO_ON_GPU: Kernels = "int8"
PRODUCTS: tuple[Kernels, ...] = ("int8", "fp8")
"""Those that multiply codes."""
FP8: Kernels = "fp8"
"""What ``auto`` is for layers of fp8 on a GPU that has units for it; on others it is ``AUTO``."""
InputGradient = Literal["full", "int8"]
"""full: a layer passes on dY fq(W), multiplied in its own dtype. int8: as bytes, dY rounded by token."""
