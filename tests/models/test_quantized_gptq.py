"""GPTQ directories: packed here with numpy, read back bit for bit, refused where they contradict themselves."""

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
LAYER = "model.layers.0.mlp.down_proj"


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned numbers [rows, n] as int32 words [rows, n * bits / 32]: a stream of bits a row, lowest first."""
    stream = (numbers[..., None].astype(np.int64) >> np.arange(bits)) & 1
    stream = stream.reshape(len(numbers), -1).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


class Gptq:
    """A writer of random codes: qweight and qzeros by the papers' layout, w = (u - z) s."""

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 32,
        sym: bool = True,
        version: int = 1,
        low: int | None = None,
        dtype: type = np.float16,
    ) -> None:
        self.bits, self.group_size, self.sym, self.version, self.dtype = bits, group_size, sym, version, dtype
        self.low = (1 if version == 1 else 0) if low is None else low
        self.random = np.random.default_rng(bits)

    @property
    def header(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": False,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
        }

    def __call__(self, name: str, linear: nn.Linear) -> tuple[dict[str, np.ndarray], np.ndarray]:
        n, k = linear.weight.shape
        size = k if self.group_size == -1 else self.group_size
        u = self.random.integers(0, 1 << self.bits, (n, k))
        z = self.random.integers(self.low, 1 << self.bits, (n, k // size))
        if self.sym:
            z[:] = 1 << (self.bits - 1)
        scale = self.random.uniform(0.001, 0.02, (n, k // size)).astype(self.dtype)
        weight = (u - z.repeat(size, 1)).astype(np.float32) * scale.astype(np.float32).repeat(size, 1)
        stored = z.T if self.version == 2 else self.less_one(z.T)
        parts = {
            "qweight": words(u, self.bits).T,
            "qzeros": stored if stored.dtype == np.int32 else words(stored, self.bits),
            "scales": scale.T,
            "g_idx": (np.arange(k) // size).astype(np.int32),
        }
        return parts, weight

    def less_one(self, z: np.ndarray) -> np.ndarray:
        """As GPTQModel does it: a one from each field of the packed words, with borrows, modulo 2^32."""
        if self.bits == 3 or z.min() > 0:
            return z - 1
        ones = sum(1 << (self.bits * i) for i in range(32 // self.bits))
        packed = words(z, self.bits).astype(np.int64) & 0xFFFFFFFF
        return ((packed - ones) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "version"),
    [(4, 32, True, 1), (4, 32, True, 2), (4, -1, False, 2), (4, 16, False, 1), (8, 32, True, 1), (8, -1, False, 1)]
    + [(2, 16, True, 1), (2, 16, False, 2), (3, 32, True, 1), (3, 32, False, 2), (3, -1, True, 2)],
)
def test_every_weight_is_what_the_writer_meant(
    make_checkpoint: Make, kind: str, bits: int, group_size: int, sym: bool, version: int
) -> None:
    made = make_checkpoint(writer := Gptq(bits, group_size, sym, version), writer.header, kind=kind)
    checkpoint = read_quantized(made.directory)
    assert list(checkpoint.records) == list(made.weights)
    for name, load in checkpoint.records.items():
        record = load()
        assert torch.equal(record.dequantize(), made.weights[name])
        assert record.spec == checkpoint.layers[name].spec
        assert record.codes.dtype == torch.int8 and record.scale.dtype == torch.float16
        assert int(record.codes.min()) >= record.spec.quant_min and int(record.codes.max()) <= record.spec.quant_max
    facts = checkpoint.facts
    assert (facts["bits"], facts["symmetric"], facts["layers"]) == (bits, sym, 14)
    assert facts["group_size"] == (None if group_size == -1 else group_size)
    assert facts["was"] == f"GPTQ (v{version})"


def test_the_model_around_it_computes_the_same(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Gptq(), writer.header, kind="qwen2")
    checkpoint = read_quantized(made.directory)
    model = load_skeleton(checkpoint, torch.float32)
    for name, load in checkpoint.records.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear) and linear.weight.is_meta
        assert (linear.bias is None) == (made.model.get_submodule(name).bias is None)
        linear.weight = nn.Parameter(load().dequantize())
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, made.model(ids).logits)


def test_scales_in_other_dtypes(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Gptq(dtype=np.float32), writer.header)
    record = read_quantized(made.directory).records[LAYER]()
    assert record.spec.scale_dtype == "fp32"
    assert torch.equal(record.dequantize(), made.weights[LAYER])


def test_v1_zero_points_of_nothing_borrow_from_their_neighbours(make_checkpoint: Make) -> None:
    writer = Gptq(sym=False, version=1, low=0)
    made = make_checkpoint(writer, writer.header | {"meta": {"quantizer": ["gptqmodel:1.4.2"]}})
    for name, load in read_quantized(made.directory).records.items():
        assert torch.equal(load().dequantize(), made.weights[name])
    made.edit_header(meta={"quantizer": "autogptq:0.7.1"})
    with pytest.raises(ModelError, match=r"15.*v1 has for 0(.|\n)*gptq_v2"):
        read_quantized(made.directory).records[LAYER]()


def test_v1_three_bits_asymmetric_is_not_guessed(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Gptq(3, sym=False, version=1), writer.header)
    with pytest.raises(ModelError, match="3-bit codes with the zero points of v1"):
        read_quantized(made.directory).records[LAYER]()


@pytest.mark.parametrize(("written", "called"), [(1, "gptq_v2"), (2, "gptq")])
def test_symmetric_codes_under_the_name_of_the_other_version(make_checkpoint: Make, written: int, called: str) -> None:
    writer = Gptq(version=written)
    made = make_checkpoint(writer, writer.header | {"checkpoint_format": called})
    assert torch.equal(read_quantized(made.directory).records[LAYER]().dequantize(), made.weights[LAYER])


def test_three_bit_zero_points_as_gptqmodel_once_wrote_them(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Gptq(3), writer.header)

    def old(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("qzeros")]:
            packed = words(np.full((len(tensors[key]), tensors[key].shape[1] * 32 // 3), 4), 3).astype(np.int64)
            ones = np.resize([0x24924924, 0x92492492, 0x49249249], packed.shape[1])
            tensors[key] = torch.tensor((packed - ones).astype(np.uint32).view(np.int32))

    made.edit_tensors(old)
    assert torch.equal(read_quantized(made.directory).records[LAYER]().dequantize(), made.weights[LAYER])


def test_zero_points_that_contradict_the_header(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Gptq(sym=False, version=2), writer.header | {"sym": True})
    with pytest.raises(ModelError, match=r"called symmetric(.|\n)*8 \(v2\) or 7 \(v1\)"):
        read_quantized(made.directory).records[LAYER]()


def test_layers_with_options_of_their_own(make_checkpoint: Make) -> None:
    four, eight = Gptq(4, 32), Gptq(8, 16, sym=False, version=1)

    def mixed(name: str, linear: nn.Linear) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return (eight if "down_proj" in name else four)(name, linear)

    overrides = {"bits": 8, "group_size": 16, "sym": False}
    made = make_checkpoint(mixed, four.header | {"dynamic": {"-:.*lm_head": {}, r"+:.*\.down_proj": overrides}})
    checkpoint = read_quantized(made.directory)
    assert all(torch.equal(load().dequantize(), made.weights[name]) for name, load in checkpoint.records.items())
    assert checkpoint.facts["mixed"] and checkpoint.layers[LAYER].spec.bits == 8
    assert len(checkpoint.lines()) == 1 and "2 linears in int8 asymmetric, groups of 16" in checkpoint.lines()[0]


def shuffle(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"].roll(1)


def test_act_order_is_refused_with_a_way_out(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Gptq(), writer.header | {"desc_act": True})
    read_quantized(made.directory)  # static groups: the order says nothing
    made.edit_tensors(shuffle)
    with pytest.raises(ModelError, match=r"act-order: column 0 belongs to group 2(.|\n)*desc_act=false"):
        read_quantized(made.directory)


def test_without_an_order_there_is_none(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Gptq(), writer.header)
    made.edit_tensors(lambda tensors: [tensors.pop(key) for key in list(tensors) if "g_idx" in key] and None)
    assert torch.equal(read_quantized(made.directory).records[LAYER]().dequantize(), made.weights[LAYER])
    made.edit_header(desc_act=True)
    with pytest.raises(ModelError, match=r"g_idx is missing"):
        read_quantized(made.directory)


def nan(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.scales"][0, 0] = float("nan")


def lose(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LAYER}.scales"]


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.qweight"] = tensors[f"{LAYER}.qweight"][:-1].contiguous()


def floats(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.qzeros"] = tensors[f"{LAYER}.qzeros"].float()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose, r"down_proj\.scales is missing"),
        (narrow, r"qweight of shape \[11, 64\](.|\n)*\[12, 64\]"),
        (floats, r"qzeros in F32(.|\n)*I32"),
        (nan, r"scales holds NaN"),
    ],
)
def test_damaged_tensors(make_checkpoint: Make, damage: Callable[[dict[str, Tensor]], None], message: str) -> None:
    made = make_checkpoint(writer := Gptq(), writer.header)
    made.edit_tensors(damage)
    with pytest.raises(ModelError, match=message):
        read_quantized(made.directory).records[LAYER]()


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"bits": 8}, r"qweight of shape (.|\n)*in 8 bits"),
        ({"bits": 5}, r"bits=5(.|\n)*2, 3, 4, 8"),
        ({"bits": None}, r"bits=None"),
        ({"group_size": 16}, r"qzeros of shape (.|\n)*group_size=16"),
        ({"group_size": 40}, r"groups of 40 in rows of (64|96)"),
        ({"group_size": 0}, r"groups of 0"),
        ({"checkpoint_format": "marlin"}, r"marlin(.|\n)*gptq_v2"),
    ],
)
def test_headers_that_lie(make_checkpoint: Make, lie: dict[str, Any], message: str) -> None:
    made = make_checkpoint(writer := Gptq(), writer.header)
    made.edit_header(**lie)
    with pytest.raises(ModelError, match=message):
        read_quantized(made.directory)


def test_biases_that_autogptq_added(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Gptq(), writer.header)
    made.edit_tensors(lambda tensors: tensors.update({f"{LAYER}.bias": torch.zeros(64, dtype=torch.float16)}))
    model = load_skeleton(read_quantized(made.directory), torch.float32)
    assert model.get_submodule(LAYER).bias is None
    made.edit_tensors(lambda tensors: tensors.update({f"{LAYER}.bias": torch.ones(64, dtype=torch.float16)}))
    with pytest.raises(ModelError, match=r"down_proj\.bias belongs to no part of LlamaForCausalLM"):
        load_skeleton(read_quantized(made.directory), torch.float32)
