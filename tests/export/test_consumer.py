"""An export read by plain transformers in a process that cannot import qtrain."""

from __future__ import annotations

import json
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
from qtrain.models.quantized.checkpoint import read_records
from qtrain.modules.deployed import DeployedModel

Deploy = Callable[[PreTrainedModel], DeployedModel]
Build = Callable[..., PreTrainedModel]

TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
UNEVEN = {"hidden_size": 96, "intermediate_size": 200, "head_dim": 24, "tie_word_embeddings": False}


CASES: dict[str, tuple[torch.dtype, dict[str, Any], dict[str, Any]]] = {
    "fp32-biased-sharded": (torch.float32, BIASED, {"max_shard_size": "100KB"}),
    "bf16-tied": (torch.bfloat16, TIED, {"group_size": 64}),
    "fp16-int8-uneven": (torch.float16, UNEVEN, {"bits": 8, "group_size": 64}),
    "bf16-rows-ignore": (torch.bfloat16, UNEVEN, {"group_size": -1, "ignore": ["re:.*layers\\.0\\."]}),
}


@pytest.fixture(scope="module")
def consumed(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Build,
    deploy: Deploy,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """All cases exported, and read by one process (its imports take 10 s)."""
    folder = tmp_path_factory.mktemp("consumed")
    for name, (dtype, shape, keys) in CASES.items():
        options = CompressedTensorsOptions(**keys)
        write(deploy(tiny_model(dtype, **shape)), options, folder / name, tokenizer=tiny_tokenizer, facts={})
    script = Path(__file__).with_name("consume.py")
    done = subprocess.run(
        [sys.executable, script, *(folder / name for name in CASES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Could not match" not in done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_consumer_computes_with_our_weights(consumed: Path, tiny_model: Build, name: str) -> None:
    dtype, shape, _ = CASES[name]
    seen = load_file(consumed / f"{name}.seen")
    model = tiny_model(dtype, **shape)
    for layer, record in read_records(consumed / name):
        model.get_submodule(layer).weight.data = record.dequantize(dtype)
    for key, value in model.named_parameters():
        assert seen[f"weight.{key}"].dtype == dtype
        assert torch.equal(seen[f"weight.{key}"], value), key
    with torch.no_grad():
        logits = model(seen["ids"]).logits
    torch.testing.assert_close(seen["logits"], logits, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert seen["tokens"].shape[1] > seen["ids"].shape[1]


def test_a_tied_head_is_in_no_file(consumed: Path) -> None:
    assert "lm_head.weight" not in load_file(consumed / "bf16-tied" / "model.safetensors")
    assert json.loads((consumed / "bf16-tied" / "config.json").read_text())["tie_word_embeddings"] is True
