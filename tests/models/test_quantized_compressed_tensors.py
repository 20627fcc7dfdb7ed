"""compressed-tensors directories: written by its own compressor, judged by its own decompressor and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from qtrain.errors import ModelError
from qtrain.models.quantized.checkpoint import load_skeleton, read_quantized

Make = Callable[..., Any]
LAYER = "model.layers.0.self_attn.q_proj"
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


class Compressed:
    """Random codes in compressed-tensors' own words."""

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = 32,
        symmetric: bool = True,
        layout: str = "pack-quantized",
        scale: torch.dtype = torch.bfloat16,
        inputs: dict[str, Any] | None = None,
        strategy: str | None = None,
    ) -> None:
        self.weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": strategy or ("group" if group_size else "channel"),
            "group_size": group_size,
            "dynamic": False,
        }
        self.inputs, self.layout, self.scale = inputs, layout, scale
        self.random = torch.Generator().manual_seed(bits)

    @property
    def header(self) -> dict[str, Any]:
        return {
            "quant_method": "compressed-tensors",
            "format": self.layout,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": self.weights, "input_activations": self.inputs}
            },
        }

    def __call__(self, name: str, linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        n, k = linear.weight.shape
        high = 1 << (self.weights["num_bits"] - 1)
        groups = k // self.weights["group_size"] if self.weights["group_size"] else 1
        shape = [1] if self.weights["strategy"] == "tensor" else [n, groups]
        scale = (torch.rand(shape, generator=self.random) * 0.02 + 0.001).to(self.scale)
        state = {"weight_scale": scale}
        zero_point = torch.zeros(shape, dtype=torch.int8)
        if not self.weights["symmetric"]:
            zero_point = torch.randint(-high, high, shape, generator=self.random, dtype=torch.int8)
            state["weight_zero_point"] = zero_point
        codes = torch.randint(-high, high, (n, k), generator=self.random, dtype=torch.int8)
        spread = (n, groups, k // groups)
        wide = (codes.view(spread).float() - zero_point.float().unsqueeze(-1)) * scale.float().unsqueeze(-1)
        weight = wide.reshape(n, k)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**self.weights))
        compressor = BaseCompressor.get_value_from_registry(self.layout)
        parts = compressor.compress({"weight": weight, **state}, scheme)
        in_fp32 = {key: value.float() if key == "weight_scale" else value for key, value in parts.items()}
        judged = compressor.decompress(in_fp32, scheme)["weight"]
        assert torch.equal(judged, weight)
        return parts, judged


SCHEMES = [
    Compressed(),
    Compressed(symmetric=False),
    Compressed(8, None),
    Compressed(8, 16, False, scale=torch.float16),
    Compressed(2, 32, False),
    Compressed(3, 32),
    Compressed(3, None, False),
    Compressed(5, 32, False),
    Compressed(8, None, layout="int-quantized", inputs=TOKEN),
    Compressed(4, 32, layout="int-quantized", inputs=TOKEN, scale=torch.float32),
    Compressed(8, None, False, layout="int-quantized", inputs=TOKEN | {"symmetric": False}),
    Compressed(8, None, layout="int-quantized", strategy="tensor", scale=torch.float32),
]


def named(writer: Compressed) -> str:
    return "-".join(map(str, [writer.layout, *writer.weights.values(), writer.scale]))


@pytest.mark.parametrize("writer", SCHEMES, ids=named)
def test_every_weight_is_what_its_library_decompresses(make_checkpoint: Make, writer: Compressed) -> None:
    made = make_checkpoint(writer, writer.header, kind="qwen2")
    checkpoint = read_quantized(made.directory)
    assert list(checkpoint.records) == list(made.weights)
    for name, load in checkpoint.records.items():
        record = load()
        assert torch.equal(record.dequantize(), made.weights[name])
        assert record.spec == checkpoint.layers[name].spec
        assert record.spec.full_range == writer.weights["symmetric"]
    assert checkpoint.facts["was"] == f"compressed-tensors ({writer.layout})"


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")  # what it says is what is wanted
@pytest.mark.parametrize(
    "writer",
    [Compressed(), Compressed(symmetric=False), Compressed(8, None, layout="int-quantized", inputs=TOKEN)],
    ids=named,
)
def test_transformers_multiplies_with_the_same_weights(make_checkpoint: Make, writer: Compressed) -> None:
    made = make_checkpoint(writer, writer.header)
    consumer = AutoModelForCausalLM.from_pretrained(
        made.directory, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    checkpoint = read_quantized(made.directory)
    for name, load in checkpoint.records.items():
        weight = consumer.get_submodule(name).weight.detach()
        # transformers 5.23 multiplies in the dtype of the scales, 5.17 in the model's.
        assert any(torch.equal(load().dequantize(dtype).float(), weight) for dtype in (torch.bfloat16, torch.float32))
    plain = load_skeleton(checkpoint, torch.float32).state_dict()
    assert all(torch.equal(value, consumer.state_dict()[key]) for key, value in plain.items() if not value.is_meta)


def test_transformers_computes_the_same_in_fp32(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Compressed(), writer.header)
    consumer = AutoModelForCausalLM.from_pretrained(made.directory, dtype=torch.float32)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(consumer(ids).logits, made.model(ids).logits)


def test_layers_with_schemes_of_their_own(make_checkpoint: Make) -> None:
    four, eight = Compressed(), Compressed(8, None, False)
    header = four.header
    groups = {"group_0": header["config_groups"]["group_0"], "group_1": eight.header["config_groups"]["group_0"]}
    groups["group_1"]["targets"] = [r"re:.*\.v_proj$"]

    def mixed(name: str, linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        return (eight if name.endswith("v_proj") else four)(name, linear)

    made = make_checkpoint(mixed, header | {"config_groups": groups})
    checkpoint = read_quantized(made.directory)
    assert {layer.spec.bits for name, layer in checkpoint.layers.items() if name.endswith("v_proj")} == {8}
    assert all(torch.equal(load().dequantize(), made.weights[name]) for name, load in checkpoint.records.items())


def test_schemes_by_the_name_of_a_preset(make_checkpoint: Make) -> None:
    writer = Compressed(8, None, layout="int-quantized", inputs=TOKEN)
    made = make_checkpoint(writer, writer.header | {"config_groups": {"W8A8": ["Linear"]}})
    assert torch.equal(read_quantized(made.directory).records[LAYER]().dequantize(), made.weights[LAYER])


def test_inputs_are_reported(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Compressed(8, None, layout="int-quantized", inputs=TOKEN), writer.header)
    inputs = read_quantized(made.directory).layers[LAYER].inputs
    assert inputs is not None and inputs.qparams is None
    spec = inputs.spec
    assert (spec.format, spec.granularity, spec.symmetric, spec.reach) == ("int8", "per_token", True, 127.5)


def test_static_inputs_come_with_their_scale(make_checkpoint: Make) -> None:
    static = TOKEN | {"strategy": "tensor", "dynamic": False, "symmetric": False}
    writer = Compressed(8, None, layout="int-quantized", inputs=static)

    def quantize(name: str, linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        parts, weight = writer(name, linear)
        zero = torch.tensor([-3], dtype=torch.int8)
        return parts | {"input_scale": torch.tensor([0.5]), "input_zero_point": zero}, weight

    inputs = read_quantized(make_checkpoint(quantize, writer.header).directory).layers[LAYER].inputs
    assert inputs is not None and inputs.qparams is not None and inputs.qparams.zero_point is not None
    assert inputs.spec.granularity == "per_tensor"
    assert (inputs.qparams.scale.item(), inputs.qparams.zero_point.item()) == (0.5, -3)


def test_zero_points_as_they_were_before_they_were_packed(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Compressed(symmetric=False), writer.header)
    record = read_quantized(made.directory).records[LAYER]()

    def unpacked(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight_zero_point"] = record.zero_point

    made.edit_tensors(unpacked)
    assert torch.equal(read_quantized(made.directory).records[LAYER]().dequantize(), made.weights[LAYER])


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_of_whole_fields(make_checkpoint: Make, bits: int) -> None:
    """As compressed-tensors packed bits that do not divide 32 until 0.17."""
    made = make_checkpoint(writer := Compressed(bits, symmetric=False), writer.header)
    records = {name: load() for name, load in read_quantized(made.directory).records.items()}
    assert all(torch.equal(record.dequantize(), made.weights[name]) for name, record in records.items())

    def whole_fields(codes: Tensor) -> Tensor:
        count = 32 // bits
        unsigned = torch.nn.functional.pad(codes.long() + (1 << (bits - 1)), (0, -codes.shape[1] % count))
        return sum(unsigned[:, i::count] << (bits * i) for i in range(count)).to(torch.int32)

    def repack(tensors: dict[str, Tensor]) -> None:
        for name, record in records.items():
            tensors[f"{name}.weight_packed"] = whole_fields(record.codes)
            tensors[f"{name}.weight_zero_point"] = whole_fields(record.zero_point.t()).t().contiguous()

    made.edit_tensors(repack)
    for name, load in read_quantized(made.directory).records.items():
        assert torch.equal(load().dequantize(), made.weights[name])


def order(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight_g_idx"] = torch.arange(64, dtype=torch.int32).flip(0) // 32


def plain_order(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight_g_idx"] = torch.arange(64, dtype=torch.int32) // 32


def test_act_order(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Compressed(), writer.header)
    made.edit_tensors(plain_order)
    assert torch.equal(read_quantized(made.directory).records[LAYER]().dequantize(), made.weights[LAYER])
    made.edit_tensors(order)
    with pytest.raises(ModelError, match=r"act-order(.|\n)*actorder=weight"):
        read_quantized(made.directory)


def test_scales_of_a_cache_are_left_aside(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Compressed(), writer.header | {"kv_cache_scheme": TOKEN | {"strategy": "tensor"}})
    made.edit_tensors(lambda tensors: tensors.update({"model.layers.0.self_attn.k_scale": torch.ones(1)}))
    checkpoint = read_quantized(made.directory)
    load_skeleton(checkpoint, torch.float32)
    assert "KV cache" in checkpoint.facts["notes"][0] and "KV cache" in checkpoint.lines()[1]


def lose(part: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(f"{LAYER}.{part}")


def put(part: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{LAYER}.{part}": value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose("weight_scale"), r"q_proj\.weight_scale is missing"),
        (lose("weight_shape"), r"q_proj\.weight_shape is missing"),
        (lose("weight_zero_point"), r"q_proj\.weight_zero_point is missing"),
        (put("weight_shape", torch.tensor([64, 60])), r"weight_shape=\[64, 60\](.|\n)*\[64, 64\]"),
        (put("weight_packed", torch.zeros(64, 7, dtype=torch.int32)), r"weight_packed of shape \[64, 7\]"),
        (put("weight_scale", torch.ones(64, 1)), r"weight_scale of shape \[64, 1\](.|\n)*\[64, 2\]"),
        (put("weight_zero_point", torch.zeros(64, 2, dtype=torch.int32)), r"weight_zero_point of shape \[64, 2\]"),
        (put("weight_zero_point", torch.full((64, 2), 9, dtype=torch.int8)), r"from 9 to 9(.|\n)*-8 \.\. 7"),
        (put("weight_scale", torch.full((64, 2), torch.inf)), r"weight_scale holds NaN or inf"),
    ],
)
def test_damaged_tensors(make_checkpoint: Make, damage: Callable[[dict[str, Tensor]], None], message: str) -> None:
    made = make_checkpoint(writer := Compressed(symmetric=False), writer.header)
    made.edit_tensors(damage)
    with pytest.raises(ModelError, match=message):
        read_quantized(made.directory).records[LAYER]()


def test_bytes_beyond_their_bits(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Compressed(4, 32, layout="int-quantized", inputs=TOKEN), writer.header)
    made.edit_tensors(put("weight", torch.full((64, 64), 9, dtype=torch.int8)))
    with pytest.raises(ModelError, match=r"from 9 to 9(.|\n)*4 bits hold -8 \.\. 7"):
        read_quantized(made.directory).records[LAYER]()


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"format": "float-quantized"}, r"float-quantized(.|\n)*start from the 16-bit"),
        ({"format": "marlin-24"}, r"marlin-24|format"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config is set"),
        ({"transform_config": {"config_groups": {"u": {}}}}, r"transform_config is set"),
        ({"config_groups": {}}, r"no config group says how"),
        ({"config_groups": {"group_0": {"weights": {}}}}, r"targets"),
    ],
)
def test_headers_that_are_not_read(make_checkpoint: Make, lie: dict[str, Any], message: str) -> None:
    made = make_checkpoint(writer := Compressed(), writer.header)
    made.edit_header(**lie)
    with pytest.raises(ModelError, match=message):
        read_quantized(made.directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 8}, r"weight_packed of shape (.|\n)*in 8 bits"),
        ({"group_size": 16}, r"weight_scale of shape (.|\n)*group of 16"),
        ({"type": "float"}, r"float|format"),
        ({"symmetric": False}, r"weight_zero_point is missing"),
    ],
)
def test_schemes_that_lie(make_checkpoint: Make, change: dict[str, Any], message: str) -> None:
    made = make_checkpoint(writer := Compressed(), writer.header)
    config = json.loads((made.directory / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["weights"] |= change
    made.edit_config(quantization_config=config)
    with pytest.raises(ModelError, match=message):
        read_quantized(made.directory)
