"""QLoRA of a 7B Llama at 1k, 4k, 16k and 32k tokens a row, as many tokens a step: what grows with the context.

    python -m benchmarks.gpu.context CASE [--tiny] [--work DIR]

32,768 random ids a step, all layers recomputed. The attention share is that of scaled_dot_product_attention's own
kernels in the device time of one more step under the profiler; the rest should take the same time a token throughout.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import lightning as L
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.measure import Case, Figures, Sizes, quiet, run, shape_of
from benchmarks.gpu.models import ON_GPU, repeated_model
from benchmarks.gpu.qlora_words import qlora_words
from benchmarks.gpu.shapes import LLAMA_7B
from benchmarks.gpu.training import train_ours

TOKENS = 32768
ATTENTION = "aten::_scaled_dot_product"
"""What the operations of every back end of scaled_dot_product_attention begin with, forward and backward."""


class AttentionShare(L.Callback):
    """Profiles one step.

    Attributes:
        share: device time of attention over that of everything; NaN before that step.
    """

    def __init__(self, step: int) -> None:
        self.step, self.share = step, float("nan")
        self._profile: profile | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin."""
        if batch_idx == self.step:
            kinds = [ProfilerActivity.CUDA] if ON_GPU else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *kinds])
            self._profile.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End, and add up."""
        if self._profile is None:
            return
        self._profile.__exit__(None, None, None)
        events, self._profile = self._profile.key_averages(), None
        taken = [event for event in events if event.key.startswith(ATTENTION) and event.device_type == DeviceType.CPU]
        if ON_GPU:  # kernels are events of their own; an operation's device time is that of its kernels
            kernels = [
                it
                for it in events
                if it.device_type == DeviceType.CUDA and not getattr(it, "is_user_annotation", False)
            ]
            whole = sum(kernel.self_device_time_total for kernel in kernels)
            self.share = sum(event.device_time_total for event in taken) / max(1.0, whole)
        else:
            whole = sum(event.self_cpu_time_total for event in events)
            self.share = sum(event.cpu_time_total for event in taken) / max(1.0, whole)


def case(asked: argparse.Namespace, *, length: int) -> Figures:
    """One of CASES."""
    shape = shape_of(LLAMA_7B, asked)
    step = TOKENS // 64 if asked.tiny else TOKENS
    length = length // 64 if asked.tiny else length
    size = Sizes(step // length, length, 1, 2, 1) if asked.tiny else Sizes(step // length, length, 2, 7, 1)
    profiled = AttentionShare(size.warm + size.steps - 1)
    common = ["trainer.gradient_clip_val=0.3", "run.recompute=full", "data.packing=false"]
    found = train_ours(repeated_model(shape), [*qlora_words(), *common], shape, size, [profiled])
    rest = (1 - profiled.share) / found.tokens_per_second
    found.more |= {"attention_share": round(profiled.share, 4), "rest_us_per_token": round(1e6 * rest, 3)}
    return found


CASES: dict[str, Case] = {f"{length // 1024}k": partial(case, length=length) for length in (1024, 4096, 16384, 32768)}

if __name__ == "__main__":
    quiet()
    run(__doc__, CASES)
