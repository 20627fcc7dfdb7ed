"""Passes over all gradients of a step: one kernel for many tensors, and no wait for the numbers they depend on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def scale_(gradients: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply each by an fp32 number [].

    torch has one kernel for many tensors only where all of them and the factor are of one dtype; otherwise each
    tensor gets a kernel of its own, which is not vectorized. A factor rounded to bf16 is wrong by up to 2^-9, in common
    for all gradients in bf16: Adam does not see it, clipping hardly. fp16 keeps the slow way, for a factor such as
    1 / 100,000 is below its normal numbers.
    """
    for same in _of_one_kind(gradients):
        dtype = torch.float32 if same[0].dtype == torch.float16 else same[0].dtype
        torch._foreach_mul_(same, factor.to(same[0].device, dtype))


@torch.no_grad()
def clip_factor(gradients: Iterable[Tensor], limit: float) -> Tensor | None:
    """What ``torch.nn.utils.clip_grad_norm_`` would multiply them by, fp32 []; None where there are none."""
    kinds = _of_one_kind(gradients)
    # In fp32, for torch's own get_total_norm rounds the norm of a gradient in bf16 to bf16.
    norms = [norm for same in kinds for norm in torch._foreach_norm(same, 2.0, dtype=_at_least_fp32(same[0]))]
    if not norms:
        return None
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]))
    return torch.clamp(limit / (total + 1e-6), max=1.0)


class EarlyClip:
    """``clip_factor`` launched as soon as the backward is, while the GPU is busy still.

    Once ``NanGuard`` has waited for the GPU, it would wait for hundreds of norms to be launched: 3 of 450 ms a step of
    a 7B Llama with adapters.
    """

    def __init__(self, gradients: Sequence[Tensor], limit: float) -> None:
        self._seen = _versions(gradients)
        self._factor = clip_factor(gradients, limit)

    def factor(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """The factor; None where these are other gradients by now, or others wrote to them."""
        return self._factor if _versions(gradients) == self._seen else None


def _versions(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    return [(id(tensor), tensor._version) for tensor in tensors]


def _of_one_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
