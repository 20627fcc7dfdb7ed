"""Tiny decoders of several families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


@pytest.fixture
def decoder() -> Callable[..., PreTrainedModel]:
    """decoder(kind, attention, **changes): random, 4 heads of 16, two of them for keys (GPT-NeoX: 4)."""

    def make(kind: str, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        shape = {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 8 if kind in ("gemma2", "gemma3_text") else None,
            "max_position_embeddings": 128,
            "initializer_range": 0.1,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if kind == "gpt_neox":
            shape.pop("num_key_value_heads")
        attention = "eager" if kind == "gemma2" else attention  # transformers caps no scores in sdpa
        config = AutoConfig.for_model(kind, **shape | changes)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        return model.eval()

    return make
