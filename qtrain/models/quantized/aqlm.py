"""AQLM directories, through transformers and the package that has their kernels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qtrain.errors import ModelError


def load(
    directory: Path,
    header: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    *,
    compute_dtype: torch.dtype,
    attention: str = "auto",
) -> PreTrainedModel:
    """The model with sums of codebook entries for weights (Egiazarian 2024, arXiv 2401.06118), frozen.

    Its kernels compute in the dtype of their codebooks, ``dtype``.

    Raises:
        ModelError: the package is not installed; a CPU with several threads; damaged files.
    """
    if find_spec("aqlm") is None:
        raise ModelError(
            "quant_method='aqlm' needs the package aqlm, which is not installed",
            where=str(directory),
            fix="pip install 'aqlm[gpu]>=1.1.6' ('aqlm[cpu]' without a GPU), or start from the 16-bit model",
        )
    # Its CPU kernel adds into one vector from all threads at once: sums off by 0.5 on two cores, right on one.
    if device.type == "cpu" and os.environ.get("NUMBA_NUM_THREADS") != "1":
        raise ModelError(
            "AQLM on a CPU, with several threads",
            where=str(directory),
            rule="aqlm 1.1.7 adds partial sums up without a lock",
            fix="NUMBA_NUM_THREADS=1 in the environment, or a GPU",
        )
    chosen = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            device_map={"": device},
            **chosen,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(" ".join(str(error).split())[:400], where=str(directory)) from None
    model.requires_grad_(False)
    model.eval()
    for module in model.modules():
        if hasattr(module, "codebooks"):
            module.register_forward_hook(_own_output)
    return model


def _own_output(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """PEFT 0.21 adds its adapter in place, to what aqlm 1.1.7 returns as a view: autograd refuses that."""
    return output.clone()
