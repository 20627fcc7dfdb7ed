"""An export read by plain transformers in a process that cannot import qtrain."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtrain.export.compressed_tensors.config import CompressedTensorsOptions
from qtrain.export.compressed_tensors.write import write
from qtrain.export.readback import read_records
from qtrain.modules.deployed import DeployedModel

Deploy = Callable[[PreTrainedModel], DeployedModel]
Build = Callable[..., PreTrainedModel]

TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
UNEVEN = {"hidden_size": 96, "intermediate_size": 200, "head_dim": 24, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("dtype", "shape", "keys"),
    [
        (torch.float32, BIASED, {"max_shard_size": "100KB"}),
        (torch.bfloat16, TIED, {"group_size": 64}),
        (torch.float16, UNEVEN, {"bits": 8, "group_size": 64}),
        (torch.bfloat16, UNEVEN, {"group_size": -1, "ignore": ["re:.*layers\\.0\\."]}),
    ],
    ids=["fp32-biased-sharded", "bf16-tied", "fp16-int8-uneven", "bf16-rows-ignore"],
)
def test_the_consumer_computes_with_our_weights(
    tmp_path: Path,
    tiny_model: Build,
    deploy: Deploy,
    tiny_tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    shape: dict[str, Any],
    keys: dict[str, Any],
) -> None:
    model = tiny_model(dtype, **shape)
    out = tmp_path / "out"
    result = write(deploy(model), CompressedTensorsOptions(**keys), out, tokenizer=tiny_tokenizer, facts={})
    consumer = Path(__file__).with_name("consume.py")
    done = subprocess.run(
        [sys.executable, consumer, out, tmp_path / "seen.safetensors"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Could not match" not in done.stderr
    seen = load_file(tmp_path / "seen.safetensors")

    records = dict(read_records(out))
    assert len(records) == result["quantized_layers"]
    for name, record in records.items():
        model.get_submodule(name).weight.data = record.dequantize(dtype)
    for name, value in model.named_parameters():
        assert seen[f"weight.{name}"].dtype == dtype
        assert torch.equal(seen[f"weight.{name}"], value), name
    with torch.no_grad():
        logits = model(seen["ids"]).logits
    torch.testing.assert_close(seen["logits"], logits, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert seen["tokens"].shape[1] > seen["ids"].shape[1]
    assert ("lm_head.weight" in seen) is False
