"""Passes over all gradients of a step: one kernel for many tensors, and no wait for the numbers they depend on."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


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


@torch.no_grad()
def norms(gradients: Sequence[Tensor]) -> Tensor:
    """The largest magnitude in each, [n] on the first one's device; NaN where one is in it."""
    found: dict[int, Tensor] = {}
    for same in _of_one_kind(gradients):
        largest = torch._foreach_norm(same, float("inf"), dtype=_at_least_fp32(same[0]))
        found |= {id(gradient): norm for gradient, norm in zip(same, largest, strict=True)}
    widest = torch.float64 if any(norm.dtype == torch.float64 for norm in found.values()) else torch.float32
    return torch.stack([found[id(gradient)].to(gradients[0].device, widest) for gradient in gradients])


def leaves_out(optimizer: Optimizer) -> bool:
    """Whether its step does nothing where its ``found_inf``, fp32 [] on a GPU, is not 0: fused ones of torch, ours."""
    return hasattr(optimizer, "found_inf") or bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def unless(found_inf: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """A kernel's factor of the gradients, fp32 []: -1, at which it does nothing, where ``found_inf`` is not 0."""
    if found_inf is None:
        return factor
    return torch.where(found_inf != 0, -1.0, found_inf.new_ones(()) if factor is None else factor)


class OnHost:
    """A small tensor on its way from a GPU to the host, which goes on meanwhile.

    Args:
        asked: False leaves it on the GPU, where nothing waits for it.
        since: from when on it is there; default: once all is done that was launched before.
    """

    def __init__(self, tensor: Tensor, *, asked: bool = True, since: torch.cuda.Event | None = None) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensor = tensor
        if not asked or not tensor.is_cuda:
            return
        self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream = torch.cuda.current_stream(tensor.device)
        if since is not None:
            stream = _aside(tensor.device)
            stream.wait_event(since)
            tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            self._tensor.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(stream)

    def get(self) -> Tensor:
        """It, once it is there; what was launched after it is not waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """For copies that are not to wait for products."""
    return torch.cuda.Stream(device)


def steps_are_read(trainer: Trainer) -> bool:
    """Whether a logger or a progress bar reads what each step logs.

    Where none does the host need not wait for a step before it launches the next: of 1B parameters on an H200 with 16
    virtual cores it launches a forward pass in 31 to 55 ms, which the GPU runs in 36.
    """
    every = getattr(trainer, "log_every_n_steps", 1)
    return trainer.progress_bar_callback is not None or (bool(trainer.loggers) and every == 1)


class EarlyClip:
    """``clip_factor`` launched as soon as the backward is, while the GPU is busy still.

    Where ``NanGuard`` has to wait for the GPU, that would wait for hundreds of norms to be launched afterwards: 3 of
    450 ms a step of a 7B Llama with adapters.
    """

    def __init__(self, gradients: Sequence[Tensor], limit: float) -> None:
        self._seen = [(weakref.ref(gradient), gradient._version) for gradient in gradients]
        self._factor = clip_factor(gradients, limit)

    def factor(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """The factor; None where these are other gradients by now, or others wrote to them."""
        same = len(gradients) == len(self._seen) and all(
            seen() is gradient and gradient._version == version
            for gradient, (seen, version) in zip(gradients, self._seen, strict=True)
        )
        return self._factor if same else None


def clip_(optimizer: Optimizer, limit: float, *, by_value: bool = False, early: EarlyClip | None = None) -> None:
    """Clip all gradients to a norm of ``limit``, or each number of them to it.

    An optimizer that takes a factor multiplies by it as it reads the gradients, which saves a pass over them.

    Args:
        early: of these gradients, as they were when it was made.
    """
    gradients = gradients_of(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = any(isinstance(gradient, DTensor) for gradient in gradients)
    if by_value:
        torch.nn.utils.clip_grad_value_(parameters, limit)
        return
    known = None if early is None else early.factor(gradients)
    if hasattr(optimizer, "gradient_factor") and not sharded:
        optimizer.gradient_factor = clip_factor(gradients, limit) if known is None else known
    elif known is not None and all(gradient.dtype == torch.float32 for gradient in gradients):
        scale_(gradients, known)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, limit)


def early_clip(trainer: Trainer) -> EarlyClip | None:
    """Of gradients that are final: where they are clipped by norm, and nothing of others may change them before."""
    by_norm = trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value"
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    callbacks: Sequence[Callback] = getattr(trainer, "callbacks", ())
    if not by_norm or scaled or len(trainer.optimizers) != 1 or any(map(_sees_gradients, callbacks)):
        return None
    return EarlyClip(gradients_of(trainer.optimizers[0]), float(trainer.gradient_clip_val or 0.0))


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Of all its parameters that have one."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _sees_gradients(callback: Callback) -> bool:
    """Whether a callback that is not ours may change gradients: what it writes through ``.data`` no version tells."""
    kind = type(callback)
    hooks = ("on_after_backward", "on_before_optimizer_step")
    ours = kind.__module__.partition(".")[0] == "qtrain"
    return not ours and any(getattr(kind, hook) is not getattr(Callback, hook) for hook in hooks)


def _of_one_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
