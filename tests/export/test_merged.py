"""The plain checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qtrain.errors import ExportError
from qtrain.export.merged.config import MergedOptions
from qtrain.export.merged.write import write
from qtrain.modules.deployed import DeployedModel

Deploy = Callable[[PreTrainedModel], DeployedModel]
Build = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_same_weights(
    tmp_path: Path, tiny_model: Build, deploy: Deploy, tiny_tokenizer: PreTrainedTokenizerFast, tied: bool
) -> None:
    model = tiny_model(torch.bfloat16, tie_word_embeddings=tied)
    out = tmp_path / "out"
    result = write(
        deploy(model), MergedOptions(max_shard_size="50KB"), out, tokenizer=tiny_tokenizer, facts={"base_model": "a/b"}
    )
    assert len(list(out.glob("model-*.safetensors"))) > 1
    read = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert read.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name
    assert result["bytes"] == sum(p.numel() * 2 for p in model.parameters())
    assert "base_model: a/b" in (out / "README.md").read_text()


def test_weights_beyond_the_dtype_are_an_error(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    model = tiny_model(torch.float16)
    model.model.norm.weight.data = torch.full((64,), 1e6)
    deployed = deploy(model)
    with pytest.raises(ExportError, match="model.norm.weight"):
        write(
            DeployedModel(deployed.config, None, deployed.tensors, torch.float16),
            MergedOptions(),
            tmp_path / "out",
            tokenizer=None,
            facts={},
        )
    assert list(tmp_path.iterdir()) == []
