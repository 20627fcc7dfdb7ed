"""Norms, rotary embeddings and gated activations as one kernel each, where liger-kernel is installed."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


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
    return "norm, RoPE and SwiGLU of liger-kernel"
