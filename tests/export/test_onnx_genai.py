"""GPTQ and AWQ exports built into ONNX by onnxruntime-genai, which shares no code with us.

Beside what qtrain needs: ``pip install onnxruntime-genai==0.18.0 onnxruntime==1.31.1 onnx onnx_ir``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtrain.export.config import FORMATS
from qtrain.modules.record import LinearRecord
from qtrain.registry import resolve

pytestmark = pytest.mark.peer
Build = Callable[..., PreTrainedModel]
Train = Callable[..., Any]
Case = tuple[str, dict[str, Any], dict[str, Any]]
GROUPS = {"group_size": 32}
CASES: dict[str, Case] = {
    "gptq": ("gptq", {"weight": {"format": "int4", **GROUPS}}, {}),
    "gptq-64": ("gptq", {"weight": {"format": "int4", "group_size": 64}}, {}),
    "gptq-learned": ("gptq", {"weight": {"format": "int4", **GROUPS, "range": "learned", "calibrate": "mse"}}, {}),
    "gptq-rows": ("gptq", {"weight": {"format": "int4"}}, {}),
    "gptq-8": ("gptq", {"weight": {"format": "int8", **GROUPS}}, {}),
    "gptq-2": ("gptq", {"weight": {"format": "int2", **GROUPS}}, {}),
    "gptq-adapters": ("gptq", {"weight": {"format": "int4", **GROUPS}, "lora": {"r": 4}}, {}),
    "awq": ("awq", {"weight": {"format": "int4", "symmetric": False, **GROUPS}}, {}),
    "awq-64": ("awq", {"weight": {"format": "int4", "symmetric": False, "group_size": 64}}, {}),
    "awq-symmetric": ("awq", {"weight": {"format": "int4", **GROUPS}}, {}),
}
OTHERS: dict[str, Case] = {
    "gptq-v2": ("gptq", {"weight": {"format": "int4", "symmetric": False, **GROUPS}}, {}),
}
WORDS = ("codes", "scales", "zero_points")


def trained(name: str, tiny_model: Build, qat_trained: Train) -> tuple[Any, Any]:
    method, model, _ = qat_trained(tiny_model(initializer_range=0.1), (CASES | OTHERS)[name][1])
    return method, model


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Build,
    tiny_tokenizer: PreTrainedTokenizerFast,
    qat_trained: Train,
) -> Path:
    """All cases exported, and built and run by one process (its imports take 10 s)."""
    for package in ("onnxruntime_genai", "onnx", "onnx_ir"):
        pytest.importorskip(package, exc_type=ImportError)
    folder = tmp_path_factory.mktemp("onnx")
    for name, (export_format, _, keys) in (CASES | OTHERS).items():
        method, model = trained(name, tiny_model, qat_trained)
        options = FORMATS.get(export_format).model_validate({"format": export_format, **keys})
        deployed = method.deployed(model, dtype=torch.float32)
        resolve(options.implementation)(deployed, options, folder / name, tokenizer=tiny_tokenizer, facts={})
    script = Path(__file__).with_name("consume_onnx_genai.py")
    done = subprocess.run(
        [sys.executable, script, *(folder / name for name in CASES | OTHERS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def records(method: Any, model: PreTrainedModel) -> dict[str, LinearRecord]:
    """The trained layers by the names of the graph's nodes: one product makes queries, keys and values."""
    found = {
        tensor.name: tensor.record()
        for tensor in method.deployed(model, dtype=torch.float32).tensors()
        if tensor.record is not None
    }
    nodes: dict[str, list[LinearRecord]] = {}
    for name, record in found.items():
        _, _, layer, block, linear, _ = name.split(".")
        block, linear = block.removeprefix("self_"), re.sub("^[qkv]_", "qkv_", linear)
        nodes.setdefault(f"/model/layers.{layer}/{block}/{linear}/MatMulNBits", []).append(record)
    return {name: joined(parts) for name, parts in nodes.items()}


def joined(parts: list[LinearRecord]) -> LinearRecord:
    points = [part.zero_point for part in parts if part.zero_point is not None]
    return LinearRecord(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(points) if points else None,
        parts[0].spec,
    )


def fields(words: NDArray[Any], bits: int, length: int) -> torch.Tensor:
    """Bytes [rows, n] as codes [rows, length], lowest bits first (onnxruntime's ContribOperators.md, MatMulNBits)."""
    parts = [words >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.from_numpy(np.stack(parts, axis=-1).reshape(len(words), -1)[:, :length].astype(np.int16))


def read(seen: Any, node: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unsigned codes [N, K], scales and unsigned zero points [N, groups]."""
    rows, columns, bits, size = seen[f"{node}.shape"].tolist()
    codes, scales, points = (seen[f"{node}.{part}"].reshape(rows, -1) for part in WORDS)
    groups = -(-columns // size)
    return fields(codes, bits, columns), torch.from_numpy(scales), fields(points, bits, groups)


def divergence(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean KL of the distributions over tokens."""
    terms = [F.log_softmax(logits.double().flatten(0, 1), -1) for logits in (found, expected)]
    return float(F.kl_div(terms[0], terms[1], log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("name", CASES)
def test_the_graph_holds_the_codes_scales_and_zero_points_of_the_training(
    built: Path, tiny_model: Build, qat_trained: Train, name: str
) -> None:
    seen, expected = np.load(built / f"{name}.npz"), records(*trained(name, tiny_model, qat_trained))
    assert {key.removesuffix(".shape") for key in seen if key.endswith(".shape")} == expected.keys()
    assert len(expected) == 10
    for node, record in expected.items():
        codes, scales, points = read(seen, node)
        half = 1 << (record.spec.bits - 1)
        zero = torch.zeros_like(record.scale) if record.zero_point is None else record.zero_point
        assert int((codes != record.codes.short() + half).sum()) == 0
        assert int((points != zero.short() + half).sum()) == 0
        assert torch.equal(scales, record.scale.float())


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_are_those_of_the_training_graph(
    built: Path, tiny_model: Build, qat_trained: Train, name: str
) -> None:
    seen, (_, model) = np.load(built / f"{name}.npz"), trained(name, tiny_model, qat_trained)
    ids, logits = torch.arange(5, 25)[None], torch.from_numpy(seen["logits"])
    with torch.no_grad():
        expected = model(ids).logits
    assert float(expected.std()) > 0.3
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert divergence(logits, expected) < 1e-10
    greedy = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 3}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0]
    assert seen["tokens"].tolist() == tokens.tolist() and len(set(tokens.tolist())) > 28


def test_zero_points_of_v2_are_taken_for_those_of_v1(built: Path, tiny_model: Build, qat_trained: Train) -> None:
    """Its reader adds 1 whatever ``checkpoint_format`` says (0.18): asymmetric codes go there as AWQ."""
    seen, (method, model) = np.load(built / "gptq-v2.npz"), trained("gptq-v2", tiny_model, qat_trained)
    for node, record in records(method, model).items():
        assert record.zero_point is not None
        codes, scales, points = read(seen, node)
        assert torch.equal(codes, record.codes.short() + 8) and torch.equal(scales, record.scale.float())
        assert torch.equal(points, (record.zero_point.short() + 9) % 16)
    with torch.no_grad():
        expected = model(torch.arange(5, 25)[None]).logits
    assert divergence(torch.from_numpy(seen["logits"]), expected) > 0.1
