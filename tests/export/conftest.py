"""A live model as the exporter sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from qtrain.modules.deployed import DeployedModel, DeployedTensor


@pytest.fixture(scope="session")
def deploy() -> Callable[[PreTrainedModel], DeployedModel]:
    """A plain transformers model, unmerged, as a DeployedModel."""

    def deployed(model: PreTrainedModel) -> DeployedModel:
        linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}

        def tensors() -> Iterator[DeployedTensor]:
            for name, value in model.state_dict().items():
                if name != "lm_head.weight" or not model.config.tie_word_embeddings:
                    yield DeployedTensor(name, tuple(value.shape), name in linears, lambda value=value: value)

        return DeployedModel(model.config, model.generation_config, tensors, next(model.parameters()).dtype)

    return deployed


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """A 2-layer Llama of any shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(dtype: torch.dtype = torch.float32, **keys: object) -> PreTrainedModel:
        torch.manual_seed(0)
        shape = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 128,
        }
        return LlamaForCausalLM(LlamaConfig(**{**shape, **keys})).to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def qat_trained() -> Callable[..., Any]:
    """Calibrated, and moved as training moves it: the method, the model, and its layers in codes by name."""
    from qtrain.methods.method import build_method
    from qtrain.methods.qat.config import QatOptions
    from qtrain.modules.quant_linear import QuantLinear

    def train(model: PreTrainedModel, options: dict[str, Any]) -> tuple[Any, PreTrainedModel, dict[str, QuantLinear]]:
        method = build_method(QatOptions.model_validate({"name": "qat", **options}))
        method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
        rows = [torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(1))]
        method.calibrate(model, rows, nullcontext, lambda items, total: items)
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.9, 1.1))
                    parameter.add_(torch.randn_like(parameter), alpha=0.01 if "lora" in name else 0.0)
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, QuantLinear) and module.weight_quantizer is not None
        }
        return method, model.eval(), layers

    return train


@pytest.fixture(scope="session")
def with_outliers() -> Callable[[Any], Any]:
    """A deployed model with one weight of each quantized layer beside its codes, as SpQR leaves them."""
    from qtrain.modules.record import Outliers

    beside = Outliers(torch.tensor([5], dtype=torch.int32), torch.ones(1, dtype=torch.bfloat16))

    def changed(tensor: DeployedTensor) -> DeployedTensor:
        record = tensor.record
        return tensor if record is None else replace(tensor, record=lambda: replace(record(), outliers=beside))

    def change(model: DeployedModel) -> DeployedModel:
        return replace(model, tensors=lambda: map(changed, model.tensors()))

    return change
