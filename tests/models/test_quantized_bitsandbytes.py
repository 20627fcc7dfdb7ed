"""bitsandbytes directories as transformers saves them; AQLM's need of its package."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.models.quantized import aqlm
from qtrain.models.quantized.checkpoint import load_codebooks, read_quantized
from qtrain.modules.frozen_linear import dense_weight, freeze_linear

Make = Callable[..., Any]
CPU = torch.device("cpu")
LAYER = "model.layers.0.self_attn.q_proj"
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]

# LLM.int8() runs its product in fp16, and says so once for each call.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")


class Bnb:
    """bitsandbytes' own quantizer and its own state dict, and the layer that we make of the same weight."""

    def __init__(self, base: str = "nf4", double_quant: bool = True, storage: torch.dtype = torch.uint8) -> None:
        self.base, self.double_quant, self.storage = base, double_quant, storage
        self.ours: dict[str, nn.Module] = {}

    @property
    def header(self) -> dict[str, Any]:
        if self.base == "int8":
            return {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 5.0}
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.base,
            "bnb_4bit_use_double_quant": self.double_quant,
        }

    def __call__(self, name: str, linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        bias = linear.bias is not None
        self.ours[name] = freeze_linear(
            linear, self.base, double_quant=self.double_quant, compute_dtype=torch.float32, device=CPU
        )
        if self.base == "int8":
            theirs = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias, has_fp16_weights=False)
            theirs.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            theirs = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias)
            theirs.weight = bnb.nn.Params4bit(
                linear.weight.data,
                requires_grad=False,
                compress_statistics=self.double_quant,
                quant_type=self.base,
                quant_storage=self.storage,
            )
        theirs = theirs.to(CPU)
        parts = {key: value for key, value in theirs.state_dict().items() if key != "bias"}
        if self.base == "int8":
            weight = parts["weight"].float() * (parts["SCB"] / 127)[:, None]
            parts["weight_format"] = torch.tensor(0, dtype=torch.uint8)
        else:
            weight = by_hand(theirs.weight.data, theirs.weight.quant_state)
        return parts, weight


def by_hand(words: Tensor, state: QuantState) -> Tensor:
    """bitsandbytes (0.50) itself reads rows that end within a block otherwise on a CPU."""
    pairs = words.flatten().view(torch.uint8)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: state.shape.numel()]
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    numbers = state.code[codes.int()] * absmax.repeat_interleave(state.blocksize)[: len(codes)]
    return numbers.view(state.shape).to(state.dtype)


def stored(layer: nn.Module) -> dict[str, Any]:
    weight = layer.weight
    if isinstance(weight, bnb.nn.Params4bit):
        return {"data": weight.data, **weight.quant_state.as_dict(packed=True)}
    return {"CB": layer.state.CB, "SCB": layer.state.SCB}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("base", "double_quant"), KINDS)
def test_layers_are_those_that_freeze_linear_makes(
    make_checkpoint: Make, base: str, double_quant: bool, kind: str
) -> None:
    made = make_checkpoint(writer := Bnb(base, double_quant), writer.header, kind=kind)
    model = load_codebooks(made.directory, torch.float32, compute_dtype=torch.float32)
    for name, ours in writer.ours.items():
        layer = model.get_submodule(name)
        assert type(layer) is type(ours)
        mine, expected = stored(layer), stored(ours)
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[key], expected[key]) for key in mine)
        assert torch.equal(dense_weight(layer), made.weights[name])
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert (layer.bias is None) == (ours.bias is None)
        if base == "int8":
            assert layer.state.threshold == 5.0
        else:
            assert layer.compute_dtype == ours.compute_dtype == torch.float32
            assert layer.support_avx512bf16_for_cpu is False
            assert layer.weight.compress_statistics == double_quant and layer.weight.quant_type == base
            assert layer.weight.bnb_quantized
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        tolerance = {"rtol": 0.05, "atol": 0.02} if base == "int8" else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(model(ids).logits, made.model(ids).logits, **tolerance)


def test_codes_under_another_dtype(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Bnb(storage=torch.bfloat16), writer.header)
    layer = load_codebooks(made.directory, torch.float32, compute_dtype=torch.float32).get_submodule(LAYER)
    assert layer.weight.dtype == torch.uint8
    assert torch.equal(dense_weight(layer), made.weights[LAYER])


def test_tied_embeddings_in_shards_and_the_first_headers(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Bnb(), writer.header, tied=True, shards=3)
    made.edit_config(quantization_config={"load_in_4bit": True})
    model = load_codebooks(made.directory, torch.bfloat16, compute_dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(dense_weight(model.get_submodule(LAYER)), made.weights[LAYER])


def test_there_are_no_integers_for_peqa(make_checkpoint: Make) -> None:
    made = make_checkpoint(writer := Bnb(), writer.header)
    with pytest.raises(ModelError, match=r"bitsandbytes(.|\n)*method\.name=qlora"):
        read_quantized(made.directory)


def edit_state(tensors: dict[str, Tensor]) -> None:
    key = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist())) | {"shape": [64, 32]}
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def break_state(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_state, r"nf4 of shape \[64, 32\](.|\n)*\[64, 64\]"),
        (break_state, r"describes no codes"),
        (lambda tensors: tensors.__delitem__(f"{LAYER}.weight.absmax"), r"weight\.absmax is missing"),
        (lambda tensors: tensors.__delitem__(f"{LAYER}.weight"), r"q_proj\.weight is missing"),
        (lambda tensors: tensors.update({f"{LAYER}.weight": torch.zeros(7, 1)}), r"weight of 28 bytes(.|\n)*2048"),
    ],
)
def test_damaged_4_bit_tensors(
    make_checkpoint: Make, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    made = make_checkpoint(writer := Bnb(), writer.header)
    made.edit_tensors(damage)
    with pytest.raises(ModelError, match=message):
        load_codebooks(made.directory, torch.float32, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("SCB", torch.ones(7), r"SCB of shape \[7\]"),
        ("SCB", torch.full((64,), torch.nan), r"SCB holds NaN"),
        ("weight_format", torch.tensor(2, dtype=torch.uint8), r"weight_format=2(.|\n)*row by row"),
    ],
)
def test_damaged_8_bit_tensors(make_checkpoint: Make, part: str, value: Tensor, message: str) -> None:
    made = make_checkpoint(writer := Bnb("int8", False), writer.header)
    made.edit_tensors(lambda tensors: tensors.update({f"{LAYER}.{part}": value}))
    with pytest.raises(ModelError, match=message):
        load_codebooks(made.directory, torch.float32, compute_dtype=torch.float32)


def test_plain_weights_under_the_header(make_checkpoint: Make) -> None:
    def plain(name: str, linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        return {"weight": linear.weight.data}, linear.weight.data

    made = make_checkpoint(plain, Bnb().header)
    with pytest.raises(ModelError, match=r"method\.base=nf4"):
        load_codebooks(made.directory, torch.float32, compute_dtype=torch.float32)


def test_aqlm_names_its_package(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_checkpoint(Bnb(), {"quant_method": "aqlm", "in_group_size": 8})
    monkeypatch.setattr(aqlm, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed(.|\n)*pip install 'aqlm\["):
        load_codebooks(made.directory, torch.float32, compute_dtype=torch.float32)
    with pytest.raises(ModelError, match=r"aqlm(.|\n)*method\.name=qlora"):
        read_quantized(made.directory)
    monkeypatch.setattr(aqlm, "find_spec", lambda name: object())
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    with pytest.raises(ModelError, match="NUMBA_NUM_THREADS=1"):
        load_codebooks(made.directory, torch.float32, compute_dtype=torch.float32)


def test_integers_are_no_codebooks(make_checkpoint: Make) -> None:
    made = make_checkpoint(Bnb(), {"quant_method": "eetq"})
    with pytest.raises(ModelError, match=r"'eetq' is not read(.|\n)*gptq, awq(.|\n)*bitsandbytes, aqlm"):
        load_codebooks(made.directory, torch.float32, compute_dtype=torch.float32)
