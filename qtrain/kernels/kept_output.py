"""Whether an output that a layer keeps for its backward is still there when that reads it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qtrain.errors import ModelError

NUMBERS = 4096
APART = 1 / 8
"""Of the norm of the numbers looked at: turned and turned back in bf16 they are 4e-3 apart, R Y and Y 0.3 to 1.4."""


class KeptOutput:
    """Some numbers of a layer's output, as it was given and as its first backward finds it.

    Kernels that write over their inputs (liger-kernel's RoPE and SwiGLU) are not seen by autograd, and the gradient
    would be wrong without a word. One layer has one of these; after the first backward it looks no more.
    """

    def __init__(self) -> None:
        self.seen = False

    def look(self, y: Tensor) -> Tensor | None:
        """Some numbers of y; None where they are known to stay, and where none can be asked for."""
        if self.seen or not y.numel() or torch.compiler.is_compiling() or y.is_meta or isinstance(y, FakeTensor):
            return None
        if y.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        return _some(y).clone()

    def check(self, y: Tensor, looked: Tensor) -> None:
        """Compare.

        Raises:
            ModelError: they are others by now.
        """
        self.seen = True
        before = looked.to(torch.float32)
        apart, norm = (_some(y).to(torch.float32) - before).norm(), before.norm()
        if bool(apart > APART * norm):  # not where a NaN is: another guard tells of those
            raise ModelError(
                "a layer's output was written over before the gradient of its scales was read off it",
                rule="scales of whole rows are trained from outputs, which have to stay as they are until the backward",
                fix="no kernels that work in place after such layers: model.fused=auto or none in place of "
                "liger-kernel's own patch, or method.weight.group_size=128",
            )


def _some(y: Tensor) -> Tensor:
    flat = y.detach().flatten()
    return flat[:: max(1, len(flat) // NUMBERS) | 1]  # an odd step, to come by all columns
