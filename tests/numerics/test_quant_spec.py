"""QuantSpec: its range, its checks, its dict."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qtrain.errors import ConfigError
from qtrain.numerics.spec import QuantSpec


@pytest.mark.parametrize(("bits", "low", "high"), [(2, -1, 1), (3, -3, 3), (4, -7, 7), (8, -127, 127)])
def test_codes_span_the_symmetric_range(bits: int, low: int, high: int) -> None:
    spec = QuantSpec(format=f"int{bits}")
    assert (spec.bits, spec.quant_min, spec.quant_max) == (bits, low, high)
    assert QuantSpec(format=f"int{bits}", full_range=True).quant_min == low - 1


@pytest.mark.parametrize(
    ("keys", "low", "high", "reach"),
    [
        ({"format": "int8", "symmetric": False}, -128, 127, 127),
        ({"format": "int8", "convention": "compressed-tensors"}, -128, 127, 127.5),
        ({"format": "int8", "convention": "torchao"}, -128, 127, 127.5),
        ({"format": "int2", "mid_rise": True}, -2, 1, 2),
        ({"format": "ternary"}, -1, 1, 1),
        ({"format": "binary"}, -1, 1, 1),
        ({"format": "fp8_e4m3"}, -448, 448, 448),
    ],
)
def test_codes_of_other_formats(keys: dict[str, object], low: int, high: int, reach: float) -> None:
    spec = QuantSpec(**keys)  # type: ignore[arg-type]
    assert (spec.quant_min, spec.quant_max, spec.reach) == (low, high, reach)


def test_a_spec_survives_json() -> None:
    spec = QuantSpec(format="int8", granularity="per_channel", group_size=None, full_range=True, scale_dtype="bf16")
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert hash(spec) == hash(QuantSpec.from_dict(spec.to_dict()))


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"format": "in4"}, "did you mean 'int4'"),
        ({"format": "ternary", "symmetric": False}, "only int2 .. int8"),
        ({"format": "fp8_e4m3", "mid_rise": True}, "only int2 .. int8"),
        ({"mid_rise": True, "symmetric": False}, "around zero"),
        ({"convention": "vlm"}, "did you mean 'vllm'"),
        ({"granularity": "per_grup"}, "did you mean 'per_group'"),
        ({"group_size": 0}, "at least 1"),
        ({"group_size": None}, "at least 1"),
        ({"granularity": "per_channel"}, "have groups"),
        ({"scale_dtype": "fp8"}, "there is: bf16, fp16, fp32"),
    ],
)
def test_what_a_spec_refuses(keys: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        QuantSpec(**keys)  # type: ignore[arg-type]


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'group_size'"):
        QuantSpec.from_dict({"groupsize": 32})


def test_a_spec_needs_no_torch() -> None:
    code = "import sys, qtrain.numerics.spec, qtrain.export.compressed_tensors.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
