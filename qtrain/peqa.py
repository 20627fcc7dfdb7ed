"""Tasks as files of scales over one packed base.

model = qtrain.peqa.load_base("runs/peqa_llama/base")
sql, chat = (qtrain.peqa.load_scales(f"runs/{name}/scales") for name in ("sql", "chat"))
qtrain.peqa.switch(model, sql)
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from qtrain.models.packed import load_packed
from qtrain.modules.scales import Scales, load_scales, save_scales, switch, take_scales

__all__ = ["Scales", "load_base", "load_scales", "save_scales", "switch", "take_scales"]


def load_base(
    directory: str | Path, dtype: torch.dtype = torch.float32, *, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The packed model of RUN/base, or of a GPTQ, AWQ or compressed-tensors directory; frozen, in eval mode.

    Args:
        dtype: of embeddings, norms and whatever else is not packed.
    """
    return load_packed(Path(directory), dtype, device=device)
