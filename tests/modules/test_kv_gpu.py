"""Keys and values as codes on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qtrain.modules.kv.cache import quantized_cache
from qtrain.modules.kv.codes import Codes
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.prepare import prepare_kv
from qtrain.modules.kv.quantizer import KVQuantizer

pytestmark = pytest.mark.gpu
SECTIONS: dict[str, dict[str, Any]] = {
    "before, per token": {"site": "pre_rope", "share": "per_token", "format": "int4", "symmetric": False},
    "after, per head": {"format": "int4"},
    "fp8": {"share": "per_token", "format": "fp8_e4m3"},
    "KIVI": {"format": "int2", "symmetric": False, "share": "per_channel", "group_size": 8, "residual": 5},
}


@pytest.mark.parametrize("name", SECTIONS)
@torch.no_grad()
def test_decoding_gives_the_training_graphs_logits(decoder: Callable[..., PreTrainedModel], name: str) -> None:
    model = decoder("llama").double().cuda()
    prepare_kv(model, KVCacheSection(**SECTIONS[name]))
    ids = torch.randint(3, 96, (2, 40), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    expected = model(ids).logits
    with quantized_cache(model) as cache:
        parts = [model(ids[:, :20], past_key_values=cache).logits]
        parts += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(20, 40)]
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["after, per head", "before, per token", "fp8"])
def test_read_is_fake_quantize_and_the_cpus(name: str, dtype: torch.dtype) -> None:
    quantizer = KVQuantizer(KVCacheSection(**SECTIONS[name]))
    x = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    reads = []
    for device in ("cpu", "cuda"):
        codes = Codes(quantizer.key, quantizer.key_layout)
        for part in x.to(device).transpose(1, 2).contiguous().transpose(1, 2).split([30, 1, 19], dim=2):
            codes.append(part)
        reads.append(codes.read())
        assert torch.equal(reads[-1], quantizer(x.to(device), x.to(device))[0])
    assert torch.equal(reads[0], reads[1].cpu())


def test_beams_and_padding_with_generate(decoder: Callable[..., PreTrainedModel]) -> None:
    model = decoder("llama").cuda()
    prepare_kv(model, KVCacheSection(**SECTIONS["before, per token"]))
    ids = torch.randint(3, 96, (2, 12), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 3}
    expected = model.generate(ids, use_cache=False, **options)
    with quantized_cache(model) as cache:
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
