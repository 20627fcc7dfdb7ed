"""The adapter in PEFT's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from qtrain.export.adapter.write import write_adapter


# peft 0.21 reads an attribute that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_puts_it_on_its_base(
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_llama_dir: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    out = tmp_path / "adapter"
    result = write_adapter(model, out, tiny_tokenizer, {"base_model": "org/base"})
    assert result["bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert {path.stat().st_mode for path in out.iterdir()} == {(out / "adapter_config.json").stat().st_mode}
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "org/base"
    for file in ("adapter_config.json", "README.md"):
        assert str(tiny_llama_dir) not in (out / file).read_text()
    base = LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        got = PeftModel.from_pretrained(base, out).eval()(ids).logits
    assert torch.equal(got, expected)
