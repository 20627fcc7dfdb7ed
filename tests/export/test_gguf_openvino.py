"""OpenVINO GenAI, which shares no code with us or transformers, generates the training graph's tokens from the file.

It has no ternary blocks, and wants all layers of a model quantized or none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtrain.export.gguf.config import GgufOptions
from qtrain.export.gguf.write import write
from qtrain.methods.method import build_method
from qtrain.methods.qat.config import QatOptions

pytestmark = pytest.mark.peer
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "ATTENTION_BACKEND": "SDPA",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "weight",
    [
        {"format": "int4", "group_size": 32},
        {"format": "int3", "granularity": "per_channel"},
        {"format": "int4", "group_size": 64, "symmetric": False},
        {"format": "int8", "granularity": "per_channel"},
    ],
    ids=str,
)
def test_greedy_tokens_and_text(
    tmp_path: Path,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    weight: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    openvino = pytest.importorskip("openvino", exc_type=ImportError)
    genai = pytest.importorskip("openvino_genai", exc_type=ImportError)
    model = tiny_model(initializer_range=0.1, tie_word_embeddings=False, hidden_size=128, eos_token_id=2)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            parameter.data = parameter.data.to(dtype).float()
    method = build_method(QatOptions.model_validate({"name": "qat", "weight": weight}))
    method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(5, 25)[None]
    method.calibrate(model, [ids], nullcontext, lambda items, total: items)
    deployed = replace(method.deployed(model.eval(), dtype=torch.float32), dtype=dtype)
    write(deployed, GgufOptions(format="gguf"), tmp_path / "out", tokenizer=tiny_tokenizer, facts={})
    greedy = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0, 20:]
    pipe = genai.LLMPipeline(str(tmp_path / "out" / "model.gguf"), "CPU", **EXACT)
    options = genai.GenerationConfig(max_new_tokens=32, do_sample=False, ignore_eos=True)
    found = pipe.generate(openvino.Tensor(np.asarray(ids, dtype=np.int64)), options).tokens[0]
    assert found == expected.tolist() and len(set(found)) > 8
    for text in ("The quick brown fox, 12 of them", "<|im_start|>user\nnaïve  scales<|im_end|>"):
        encoded = pipe.get_tokenizer().encode(text, add_special_tokens=False).input_ids.data[0]
        assert encoded.tolist() == tiny_tokenizer(text)["input_ids"]
