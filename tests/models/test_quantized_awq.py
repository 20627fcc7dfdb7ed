"""AWQ directories: packed here nibble by nibble, read back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtrain.errors import ModelError
from qtrain.models.quantized.awq import _columns
from qtrain.models.quantized.checkpoint import load_skeleton, read_quantized

Make = Callable[..., Any]
LAYER = "model.layers.1.self_attn.k_proj"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def gemm_words(numbers: np.ndarray) -> np.ndarray:
    """Numbers in 0 .. 15 [rows, columns] as int32 words [rows, columns / 8]: nibble i is column ORDER[i]."""
    packed = np.zeros((numbers.shape[0], numbers.shape[1] // 8), dtype=np.uint32)
    for nibble, column in enumerate(ORDER):
        packed |= numbers[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return packed.view(np.int32)


class Awq:
    """A writer of random codes, w = (u - z) s."""

    def __init__(self, group_size: int = 32) -> None:
        self.group_size = group_size
        self.random = np.random.default_rng(3)
        self.header = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }

    def __call__(self, name: str, linear: nn.Linear) -> tuple[dict[str, np.ndarray], np.ndarray]:
        n, k = linear.weight.shape
        size = k if self.group_size == -1 else self.group_size
        u, z = self.random.integers(0, 16, (n, k)), self.random.integers(0, 16, (n, k // size))
        scale = self.random.uniform(0.001, 0.02, (n, k // size)).astype(np.float16)
        weight = (u - z.repeat(size, 1)).astype(np.float32) * scale.astype(np.float32).repeat(size, 1)
        return {"qweight": gemm_words(u.T), "qzeros": gemm_words(z.T), "scales": scale.T}, weight


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 20), eights=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_order_of_the_nibbles(rows: int, eights: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 16, (rows, eights * 8))
    codes = _columns(torch.from_numpy(gemm_words(numbers)))
    assert np.array_equal(codes.numpy(), (numbers - 8).T)


@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_every_weight_is_what_the_writer_meant(make_checkpoint: Make, kind: str, group_size: int) -> None:
    made = make_checkpoint(writer := Awq(group_size), writer.header, kind=kind)
    checkpoint = read_quantized(made.directory)
    assert list(checkpoint.records) == list(made.weights)
    for name, load in checkpoint.records.items():
        record = load()
        assert torch.equal(record.dequantize(), made.weights[name])
        assert record.spec == checkpoint.layers[name].spec and not record.spec.symmetric
        assert record.zero_point is not None and record.zero_point.shape == record.scale.shape
    model = load_skeleton(checkpoint, torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight.float(), made.model.lm_head.weight)


def test_the_header_of_autoawq(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Awq(), writer.header)
    made.edit_config(quantization_config=None)
    (made.directory / "quant_config.json").write_text(
        '{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}'
    )
    checkpoint = read_quantized(made.directory)
    assert checkpoint.method == "awq"
    assert torch.equal(checkpoint.records[LAYER]().dequantize(), made.weights[LAYER])


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"version": "gemv"}, r"version='gemv'(.|\n)*gemm"),
        ({"bits": 8}, r"bits=8"),
        ({"group_size": 64}, r"groups of 64 in rows of 96|qzeros of shape"),
    ],
)
def test_headers_that_lie(make_checkpoint: Make, lie: dict[str, Any], message: str) -> None:
    made = make_checkpoint(writer := Awq(), writer.header)
    made.edit_header(**lie)
    with pytest.raises(ModelError, match=message):
        read_quantized(made.directory)


def test_words_of_gptq_under_the_name_of_awq(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Awq(), writer.header)
    made.edit_tensors(lambda tensors: tensors.update({f"{LAYER}.qweight": torch.zeros(8, 32, dtype=torch.int32)}))
    with pytest.raises(ModelError, match=r"k_proj\.qweight of shape \[8, 32\](.|\n)*\[64, 4\]"):
        read_quantized(made.directory)
