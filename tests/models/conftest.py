"""Quantized directories of tiny models, packed by code that shares nothing with the readers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

Quantize = Callable[[str, nn.Linear], tuple[dict[str, np.ndarray | Tensor], np.ndarray | Tensor]]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


@dataclass
class Made:
    """A directory, what its quantized layers multiply with, and the model that has these weights in fp32."""

    directory: Path
    weights: dict[str, Tensor]
    model: PreTrainedModel

    def edit_config(self, **changes: Any) -> None:
        path = self.directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def edit_header(self, **changes: Any) -> None:
        config = json.loads((self.directory / "config.json").read_text())
        self.edit_config(quantization_config=config["quantization_config"] | changes)

    def edit_tensors(self, change: Callable[[dict[str, Tensor]], None]) -> None:
        tensors = load_file(self.directory / "model.safetensors")
        change(tensors)
        save_file(tensors, self.directory / "model.safetensors")


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Made]:
    """``make(quantize, header, kind="llama" | "qwen2", tied=..., shards=..., intermediate_size=...)``: every linear but
    lm_head quantized.
    """

    def make(
        quantize: Quantize,
        header: Mapping[str, Any],
        *,
        kind: str = "llama",
        tied: bool = False,
        shards: int = 1,
        **sizes: int,
    ) -> Made:
        torch.manual_seed(7)
        classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
        model = classes[1](classes[0](**{**SIZES, **sizes}, tie_word_embeddings=tied)).eval()
        for parameter in model.parameters():  # what the file holds must survive its dtype
            parameter.data = torch.randn_like(parameter).mul(0.05).to(torch.bfloat16).float()
        tensors = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
        if tied:
            del tensors["lm_head.weight"]
        weights = {}
        for name, linear in model.named_modules():
            if isinstance(linear, nn.Linear) and name != "lm_head":
                parts, weight = quantize(name, linear)
                weights[name] = torch.as_tensor(weight)
                linear.weight.data = weights[name].float()
                del tensors[f"{name}.weight"]
                tensors |= {f"{name}.{part}": torch.as_tensor(value).contiguous() for part, value in parts.items()}
        directory = tmp_path / "checkpoint"
        directory.mkdir()
        model.config.save_pretrained(directory)
        model.generation_config.save_pretrained(directory)
        made = Made(directory, weights, model)
        made.edit_config(quantization_config=dict(header))
        names = sorted(tensors)
        if shards == 1:
            save_file(tensors, directory / "model.safetensors")
        else:
            files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
            for i, file in enumerate(files):
                save_file({name: tensors[name] for name in names[i::shards]}, directory / file)
            index = {name: files[i % shards] for i, name in enumerate(names)}
            (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return made

    return make
