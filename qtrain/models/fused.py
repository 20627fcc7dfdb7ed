"""Norms, rotary embeddings and gated activations as one kernel each, where liger-kernel is installed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtrain.kernels.rms_norm import fits, frozen_rms_norm
from qtrain.kernels.room import Spare
from qtrain.kernels.rotary import Pair, Rotary, Turn


def fuse_layers(model: PreTrainedModel, device: torch.device, asked: str, *, keeps_outputs: bool = False) -> str:
    """Let liger-kernel take the model's RMSNorm, RoPE and SwiGLU, in place; what was done or why not, in words.

    The loss stays ours. In fp32 the results differ by rounding alone. Models that are made later are as transformers
    has them, but that RoPE of this family runs by the kernel on a GPU.

    Args:
        asked: ``auto``, or ``none`` for the model's own layers.
        keeps_outputs: linear layers will keep their outputs for the backward, so that no kernel may write its
            gradients over them, as liger-kernel's SwiGLU does over gate and up.
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
    gated = {} if not keeps_outputs else {"swiglu": False, "geglu": False, "relu_squared": False}
    with _as_they_were({sys.modules[type(module).__module__] for module in model.modules()}):
        # By instance, as transformers' own Trainer does it.
        _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False, **gated)
    for module in model.modules():
        if getattr(module, "casting_mode", None) == "llama" and getattr(module, "offset", None) == 0.0:
            object.__setattr__(module, "forward", _Norm(module, module.forward))
    taken = "norm and RoPE" if keeps_outputs else "norm, RoPE and SwiGLU"
    return f"{taken} of liger-kernel, frozen norms of our own"


@contextmanager
def _as_they_were(files: Iterable[ModuleType]) -> Iterator[None]:
    """Modelling files whose names mean what they did, but for rotary embeddings.

    liger-kernel changes the classes there too: a model made later, on a CPU say, would have kernels that need a GPU.
    """
    modeling = [file for file in files if "modeling_" in file.__name__]
    before = [(file, name, value) for file in modeling for name, value in vars(file).items()]
    try:
        yield
    finally:
        for file, name, value in before:
            found = vars(file)[name]
            if found is not value:
                own = value.own if isinstance(value, Rotary) else value
                setattr(file, name, Rotary(own, found, _turn_of(found)) if "rotary" in name else value)


def _turn_of(kernel: Callable[..., Any]) -> Turn | None:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    return liger_turn if kernel is liger_rotary_pos_emb else None


def liger_turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Pair:
    """liger-kernel's R q and R k, or R^T, where they lie (arguments: ``Turn``)."""
    from liger_kernel.ops.rope import rope_backward, rope_forward

    q, k = (rope_backward if back else rope_forward)(q, k, cos, sin)[:2]
    return q, k


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
