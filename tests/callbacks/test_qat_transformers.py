"""Encoders, encoder-decoders and decoders of transformers inside a plain LightningModule, W4A4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from qtrain.callbacks.quantization_aware_training import QuantizationAwareTraining
from qtrain.modules.kv.prepare import kv_quantizers
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizers import quantizers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]
SMALL: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}


def bert() -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **SMALL)
    )


def bart() -> PreTrainedModel:
    return BartForConditionalGeneration(
        BartConfig(encoder_attention_heads=4, decoder_attention_heads=4, decoder_start_token_id=2, **LAYERS, **SMALL)
    )


def t5() -> PreTrainedModel:
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0, **SMALL)
    return T5ForConditionalGeneration(config)


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            **SMALL,
        )
    )


class Wrapper(LightningModule):
    """As people write it around any of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        if self.training:
            self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def fit(path: Path, model: PreTrainedModel, steps: int = 25, **keys: Any) -> Wrapper:
    module = Wrapper(model.train())
    rows = torch.randint(3, 40, (4, 10), generator=torch.Generator().manual_seed(0))
    Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        default_root_dir=path,
        callbacks=[QuantizationAwareTraining(**keys)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    return module


@pytest.mark.parametrize("make", [bert, bart, t5, llama])
def test_w4a4_trains_and_the_loss_falls(tmp_path: Path, make: Any) -> None:
    seed_everything(0, verbose=False)
    module = fit(tmp_path, make(), weight={"format": "int4"}, activation={"format": "int4"})
    linears = [part for part in module.modules() if isinstance(part, QuantLinear)]
    assert len(linears) >= 12
    assert all(part.weight.grad is not None for part in linears)
    assert sum(module.losses[-5:]) < 0.8 * sum(module.losses[:5])


def test_static_ranges_reach_encoder_and_decoder(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module = fit(
        tmp_path,
        bart(),
        steps=2,
        weight={"format": "int4", "range": "learned", "calibrate": "mse"},
        activation={"format": "int8", "range": "static", "calibrate": "percentile"},
        embedding={"format": "int8"},
    )
    assert all(quantizer.ready for _, quantizer in quantizers(module))
    assert module.model.get_output_embeddings().weight is not module.model.get_input_embeddings().weight


def test_keys_and_values_of_a_decoder(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module = fit(
        tmp_path,
        llama(),
        weight={"format": "int4"},
        activation={"format": "int8"},
        kv_cache={"format": "int4", "symmetric": False, "share": "per_token", "site": "pre_rope"},
    )
    assert len(list(kv_quantizers(module))) == 4
    assert sum(module.losses[-5:]) < 0.8 * sum(module.losses[:5])


def test_keys_and_values_alone(tmp_path: Path) -> None:
    module = fit(tmp_path, llama(), steps=1, kv_cache={"format": "int8"})
    assert len(list(quantizers(module))) == 4
