"""Norms, rotary embeddings and gated activations as one kernel each, where liger-kernel is installed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtrain.kernels.rms_norm import fits, frozen_rms_norm
from qtrain.kernels.room import Spare


def fuse_layers(model: PreTrainedModel, device: torch.device, asked: str) -> str:
    """Let liger-kernel take the model's RMSNorm, RoPE and SwiGLU, in place; what was done or why not, in words.

    The loss stays ours. In fp32 the results differ by rounding alone.

    Args:
        asked: ``auto``, or ``none`` for the model's own layers.
    """
    if asked == "none":
        return "the model's own (model.fused=none)"
    if device.type != "cuda":
        return "the model's own: fused kernels need a GPU"
    # 0.8.5 warns about each back end of its own that is not installed, at import or at an operation's first use.
    logging.getLogger("liger_kernel.backends.registry").addFilter(_says_more_than_absent)
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return "the model's own: pip install 'qtrain[gpu]' brings fused kernels"
    kind = str(model.config.model_type)
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"the model's own: liger-kernel has none for {kind}"
    # By instance, as transformers' own Trainer does it.
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    for module in model.modules():
        if getattr(module, "casting_mode", None) == "llama" and getattr(module, "offset", None) == 0.0:
            object.__setattr__(module, "forward", _Norm(module, module.forward))
    return "norm, RoPE and SwiGLU of liger-kernel, frozen norms of our own"


@dataclass(eq=False)
class _Norm:
    """liger-kernel's RMSNorm, by a kernel without the weight's gradient where the weight does not train."""

    module: Any
    forward: Callable[[Tensor], Tensor]
    spare: Spare = field(default_factory=Spare)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight = self.module.weight
        if fits(hidden_states, weight):
            return frozen_rms_norm(hidden_states, weight, self.module.variance_epsilon, self.spare)
        return self.forward(hidden_states)


def _says_more_than_absent(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Backend impl '%s' for op '%s' could not be imported")
