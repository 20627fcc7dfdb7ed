"""W8A8 in onnxruntime: a graph that multiplies the trained codes says what the training graph says.

Beside what qtrain needs: ``pip install onnxruntime-genai==0.18.0 onnxruntime==1.31.1 onnx onnx_ir``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtrain.errors import ExportError
from qtrain.export.config import FORMATS
from qtrain.export.onnx_int8 import use_int8_products
from qtrain.registry import resolve

pytestmark = pytest.mark.peer
Build = Callable[..., PreTrainedModel]
Train = Callable[..., Any]
ROWS = {"weight": {"format": "int8"}}
STATIC = {"format": "int8", "range": "static", "scale_dtype": "bf16"}
CASES: dict[str, dict[str, Any]] = {
    "dynamic": {**ROWS, "activation": {"format": "int8", "convention": "compressed-tensors"}},
    "static": {**ROWS, "activation": {**STATIC, "convention": "compressed-tensors"}},
    "static-asymmetric": {**ROWS, "activation": {**STATIC, "symmetric": False}},
    "w4a8": {"weight": {"format": "int4"}, "activation": {"format": "int8", "convention": "compressed-tensors"}},
}
IDS = torch.arange(5, 25)[None]


def export(
    folder: Path, model: PreTrainedModel, training: dict[str, Any], train: Train, tokenizer: Any
) -> tuple[Any, dict[str, Any]]:
    """The run merged, built by onnxruntime-genai, and in compressed-tensors."""
    for package in ("onnxruntime_genai", "onnx", "onnx_ir"):
        pytest.importorskip(package, exc_type=ImportError)
    method, model, layers = train(model, training)
    for name in ("merged", "compressed-tensors"):
        options = FORMATS.get(name).model_validate({"format": name})
        deployed = method.deployed(model, dtype=torch.float32)
        resolve(options.implementation)(deployed, options, folder / name, tokenizer=tokenizer, facts={})
    words = [f"-i={folder / 'merged'}", f"-o={folder / 'built'}", f"-c={folder / 'cache'}", "-p=fp32", "-e=cpu"]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", *words]
    done = subprocess.run(builder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return model, layers


def run(directory: Path) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt, and 32 greedy tokens after it."""
    onnxruntime_genai: Any = pytest.importorskip("onnxruntime_genai", exc_type=ImportError)
    model = onnxruntime_genai.Model(str(directory))
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=52, min_length=52, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(IDS[0].numpy().astype(np.int32))
    logits = torch.from_numpy(generator.get_output("logits").copy())
    while not generator.is_done():
        generator.generate_next_token()
    return logits, generator.get_sequence(0).tolist()


@pytest.mark.parametrize("name", CASES)
def test_products_of_the_codes(
    tmp_path: Path, tiny_model: Build, tiny_tokenizer: PreTrainedTokenizerFast, qat_trained: Train, name: str
) -> None:
    model, layers = export(tmp_path, tiny_model(initializer_range=0.1), CASES[name], qat_trained, tiny_tokenizer)
    exchanged = use_int8_products(tmp_path / "built", tmp_path / "compressed-tensors", tmp_path / "int8")
    assert len(exchanged) == 10 and len(layers) == 14
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(tmp_path / "int8" / "model.onnx")).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") == 10 and kinds.count("MatMul") == 1  # the head
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    codes, qparams = layers["model.layers.1.mlp.down_proj"].codes()
    assert (held["model.layers.1.mlp.down_proj.MatMul.weight.codes"] == codes.t().numpy()).all()
    assert (held["model.layers.1.mlp.down_proj.MatMul.weight.scale"] == qparams.scale.float().flatten().numpy()).all()
    with torch.no_grad():
        expected = model(IDS).logits
    logits, tokens = run(tmp_path / "int8")
    difference = (logits - expected).abs().amax(-1)[0]
    # Sums in another order move an input that lies between two codes: one such code, and what attends to it is moved.
    assert float(difference[:5].max()) < 1e-5 and float(difference.max()) < 0.1
    floats = (run(tmp_path / "built")[0] - expected).abs().amax(-1)[0]
    assert float(floats.min()) > 1e-3
    greedy = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 3}
    assert tokens == model.generate(IDS, attention_mask=torch.ones_like(IDS), **greedy)[0].tolist()


def test_what_has_no_product_of_bytes_is_refused(
    tmp_path: Path, tiny_model: Build, tiny_tokenizer: PreTrainedTokenizerFast, qat_trained: Train
) -> None:
    export(tmp_path, tiny_model(), {"weight": {"format": "int4", "group_size": 32}}, qat_trained, tiny_tokenizer)
    with pytest.raises(ExportError, match="a layer without a product of bytes"):
        use_int8_products(tmp_path / "built", tmp_path / "compressed-tensors", tmp_path / "int8")
    assert not (tmp_path / "int8").exists()
