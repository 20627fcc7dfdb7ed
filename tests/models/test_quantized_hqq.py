"""HQQ directories: packed here with numpy as hqq's state dict lies in safetensors, and by hqq where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.models.quantized.checkpoint import load_skeleton, read_quantized

Make = Callable[..., Any]
LAYER = "model.layers.0.self_attn.q_proj"
HEADER = {
    "quant_method": "hqq",
    "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 32, "axis": 1}},
    "skip_modules": ["lm_head"],
}
PACKING = {
    8: ("8bit_u8", 1),
    6: ("8bit_u8", 1),
    5: ("8bit_u8", 1),
    4: ("4bit_u8", 2),
    3: ("3bit_32", 10),
    2: ("2bit_u8", 4),
}


def text(string: str) -> np.ndarray:
    return np.frombuffer(string.encode(), dtype=np.uint8).copy()


class Hqq:
    """A writer of random codes, w = (u - z) s with zero points of any value, or whole ones."""

    def __init__(
        self, bits: int = 4, group_size: int = 32, whole: bool = False, scale: torch.dtype = torch.float16
    ) -> None:
        self.bits, self.group_size, self.whole, self.scale = bits, group_size, whole, scale
        self.random = np.random.default_rng(bits)

    def __call__(self, name: str, linear: nn.Linear) -> tuple[dict[str, np.ndarray | Tensor], Tensor]:
        n, k = linear.weight.shape
        size = k if self.group_size == -1 else self.group_size
        rows = n * k // size
        u = self.random.integers(0, 1 << self.bits, (rows, size))
        z = torch.from_numpy(self.random.uniform(0, (1 << self.bits) - 1, (rows, 1))).to(self.scale)
        z = z.round() if self.whole else z
        scale = torch.from_numpy(self.random.uniform(0.001, 0.02, (rows, 1))).to(self.scale)
        weight = (torch.from_numpy(u).float() - z.float()) * scale.float()
        packing, count = PACKING[self.bits]
        step = -(-rows // count)
        padded = np.zeros((step * count, size), dtype=np.int64)
        padded[:rows] = u
        field = 3 if packing == "3bit_32" else 8 // count
        packed = sum(padded[i * step : (i + 1) * step] << (field * (count - 1 - i)) for i in range(count))
        meta = {"nbits": self.bits, "group_size": size, "axis": 1}
        flags = {"view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "offload_meta": 0, "encoded_state_dict": 1}
        flags |= {"stores_quant_config": 1, "channel_wise": 1, "optimize": 1, "round_zero": int(self.whole)}
        return {
            "W_q": packed.astype(np.int32 if packing == "3bit_32" else np.uint8),
            "scale": scale,
            "zero": z,
            "shape": np.array([n, k]),
            "packing": text(packing),
            "unpack_view_dtype": text("torch.int32" if packing == "3bit_32" else "torch.uint8"),
            "compute_dtype": text(str(self.scale)),
            **{key: np.array(value, dtype=np.int32) for key, value in meta.items()},
            **{key: np.array(value, dtype=np.uint8) for key, value in flags.items()},
        }, weight.reshape(n, k)


@pytest.mark.parametrize("bits", sorted(PACKING))
@pytest.mark.parametrize(("group_size", "scale"), [(32, torch.float16), (16, torch.bfloat16), (-1, torch.float32)])
def test_every_weight_is_what_the_writer_meant(
    make_checkpoint: Make, bits: int, group_size: int, scale: torch.dtype
) -> None:
    made = make_checkpoint(Hqq(bits, group_size, scale=scale), HEADER, kind="qwen2")
    with pytest.raises(ModelError, match=r"14 layers are no whole numbers(.|\n)*method\.init=hqq"):
        read_quantized(made.directory)
    checkpoint = read_quantized(made.directory, whole_zero_points=False)
    assert list(checkpoint.records) == list(made.weights)
    for name, load in checkpoint.records.items():
        record = load()
        if scale == torch.float32:  # z - 2^(b-1) rounds where z has more bits than 16
            torch.testing.assert_close(record.dequantize(), made.weights[name], rtol=0, atol=1e-6)
        else:
            assert torch.equal(record.dequantize(), made.weights[name])
        assert record.zero_point is not None and record.zero_point.dtype == torch.float32
        assert not checkpoint.layers[name].whole_zero_points
    assert "14 layers are no whole numbers" in checkpoint.facts["notes"][0]
    load_skeleton(checkpoint, torch.float32)


def test_whole_zero_points_are_integers(make_checkpoint: Make) -> None:
    made = make_checkpoint(Hqq(whole=True), HEADER)
    checkpoint = read_quantized(made.directory)
    for name, load in checkpoint.records.items():
        record = load()
        assert record.zero_point is not None and record.zero_point.dtype == torch.int8
        assert torch.equal(record.dequantize(), made.weights[name])
    assert checkpoint.facts["notes"] == []


def viewed(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.W_q"] = tensors[f"{LAYER}.W_q"].view(torch.bfloat16)
    tensors[f"{LAYER}.view_as_float"] = torch.tensor(1, dtype=torch.uint8)


@pytest.mark.parametrize("bits", [3, 4])
def test_words_under_the_name_of_floats(make_checkpoint: Make, bits: int) -> None:
    made = make_checkpoint(Hqq(bits), HEADER)
    made.edit_tensors(viewed)
    checkpoint = read_quantized(made.directory, whole_zero_points=False)
    assert torch.equal(checkpoint.records[LAYER]().dequantize(), made.weights[LAYER])


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("axis", torch.tensor(0), r"axis=0(.|\n)*axis=1"),
        ("nbits", torch.tensor(1.58), r"nbits=1\.58|whole number"),
        ("nbits", torch.tensor(1), r"nbits=1"),
        ("quant_scale", torch.tensor(1), r"quantized themselves"),
        ("shape", torch.tensor([64, 32]), r"shape \[64, 32\](.|\n)*\[64, 64\]"),
        ("group_size", torch.tensor(16), r"scale of shape"),
        ("packing", torch.tensor(list(b"2bit_u8"), dtype=torch.uint8), r"packing='2bit_u8' of 4 bits"),
        ("packing", torch.tensor(list(b"9bit"), dtype=torch.uint8), r"packing='9bit'"),
        ("W_q", torch.zeros(3, 32, dtype=torch.uint8), r"W_q of shape \[3, 32\]"),
        ("zero", torch.zeros(64, 2), r"zero of shape"),
        ("scale", torch.full((128, 1), torch.nan), r"scale holds NaN"),
        ("zero", torch.full((128, 1), torch.inf), r"zero holds NaN or inf"),
    ],
)
def test_damaged_tensors(make_checkpoint: Make, part: str, value: Tensor, message: str) -> None:
    made = make_checkpoint(Hqq(), HEADER)
    made.edit_tensors(lambda tensors: tensors.update({f"{LAYER}.{part}": value}))
    with pytest.raises(ModelError, match=message):
        read_quantized(made.directory, whole_zero_points=False).records[LAYER]()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq_computes_the_same(make_checkpoint: Make, bits: int) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")

    def by_hqq(name: str, linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        options = quantize.BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
        options["weight_quant_params"]["optimize"] = False  # in fp16, which a CPU has no kernels for
        layer = quantize.HQQLinear(
            nn.Linear(1, 1), options, compute_dtype=torch.float32, device="cpu", initialize=False
        )
        layer.W_q, layer.meta = quantize.Quantizer.quantize(
            linear.weight.data, device="cpu", compute_dtype=torch.float32, **options["weight_quant_params"]
        )
        layer.meta |= {"compute_dtype": torch.float32, "quant_scale": False, "quant_zero": False}
        layer.meta |= {key: layer.meta[key].half() for key in ("scale", "zero")}
        state = {key: value for key, value in layer.state_dict().items() if key != "bias" and value is not None}
        return state, quantize.Quantizer.dequantize(layer.W_q, layer.meta)

    made = make_checkpoint(by_hqq, HEADER)
    for name, load in read_quantized(made.directory, whole_zero_points=False).records.items():
        assert torch.equal(load().dequantize(), made.weights[name])
