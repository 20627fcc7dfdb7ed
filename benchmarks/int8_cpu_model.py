"""W8A8 exports of one model in the programs that run them on a CPU, beside fp32: a prompt, and tokens after it.

    OMP_NUM_THREADS=1 python benchmarks/int8_cpu_model.py DIRECTORY [OUT.md]

A Llama of SmolLM2-135M's widths (576, 1536; 8 layers, 4096 words, random weights), exported into DIRECTORY. Medians
over 5 rounds of all programs in turn: 512 tokens read, then 32 written one by one; time that one thread had on a core.
Needs onnxruntime-genai 0.18, onnx, onnx_ir; torchao 0.18 for its row.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qtrain.export.config import FORMATS
from qtrain.export.onnx_int8 import use_int8_products as rewrite
from qtrain.methods.method import build_method
from qtrain.methods.qat.config import QatOptions
from qtrain.models.packed import load_packed
from qtrain.modules.int8_linear import use_int8_products
from qtrain.registry import resolve

PROMPT, WRITTEN, ROUNDS = 512, 32, 5
W8A8 = {"weight": {"format": "int8"}, "activation": {"format": "int8", "convention": "compressed-tensors"}}
TRAINED: dict[str, dict[str, Any]] = {
    "merged": W8A8,
    "compressed-tensors": W8A8,
    "torchao": W8A8,
    "gptq": {"weight": {"format": "int8", "group_size": 32}},
}
BUILT = {"fp32": ("merged", "-p=fp32"), "gptq-1": ("gptq", "accuracy_level=1"), "gptq-4": ("gptq", "accuracy_level=4")}
Pass = Callable[[], tuple[float, float]]


def export(folder: Path) -> None:
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4096,
        max_position_embeddings=1024,
        initializer_range=0.05,
    )
    # The builder copies one; no text is read here.
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="?")
    for name, training in TRAINED.items():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        method = build_method(QatOptions.model_validate({"name": "qat", **training}))
        method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
        method.calibrate(model, [], contextlib.nullcontext, lambda items, total: items)
        options = FORMATS.get(name).model_validate({"format": name})
        deployed = method.deployed(model, dtype=torch.float32)
        resolve(options.implementation)(deployed, options, folder / name, tokenizer=tokenizer, facts={})
    for name, (source, option) in BUILT.items():
        arguments = [f"-i={folder / source}", f"-o={folder / 'onnx' / name}", f"-c={folder / 'cache'}", "-e=cpu"]
        arguments += [option] if option.startswith("-") else ["-p=int4", "--extra_options", option]
        arguments += ["nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"] if source == "gptq" else []
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *arguments]
        subprocess.run(command, check=True, capture_output=True)
    rewrite(folder / "onnx" / "fp32", folder / "compressed-tensors", folder / "onnx" / "int8")


def in_torch(model: PreTrainedModel) -> Pass:
    def once() -> tuple[float, float]:
        begin = time.process_time()
        out = model(torch.arange(PROMPT)[None], use_cache=True, logits_to_keep=1)
        read = time.process_time()
        for _ in range(WRITTEN):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        return read - begin, time.process_time() - read

    return once


def in_onnxruntime(directory: Path) -> Pass:
    path = directory / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    path.write_text(json.dumps(config), encoding="utf-8")
    model = onnxruntime_genai.Model(str(directory))

    def once() -> tuple[float, float]:
        options = onnxruntime_genai.GeneratorParams(model)
        options.set_search_options(max_length=PROMPT + WRITTEN + 1, min_length=PROMPT + WRITTEN + 1, do_sample=False)
        generator = onnxruntime_genai.Generator(model, options)
        begin = time.process_time()
        generator.append_tokens(np.arange(PROMPT, dtype=np.int32))
        generator.generate_next_token()
        read = time.process_time()
        for _ in range(WRITTEN):
            generator.generate_next_token()
        return read - begin, time.process_time() - read

    return once


def programs(folder: Path) -> dict[str, Pass]:
    def loaded(name: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()

    integers = load_packed(folder / "compressed-tensors", torch.float32)
    use_int8_products(integers)
    made = {
        "transformers, fp32": in_torch(loaded("merged")),
        "transformers with compressed-tensors (W8A8 in floats)": in_torch(loaded("compressed-tensors")),
        "qtrain, int8 products (oneDNN)": in_torch(integers),
        "onnxruntime, fp32": in_onnxruntime(folder / "onnx" / "fp32"),
        "onnxruntime, int8 products (MatMulInteger)": in_onnxruntime(folder / "onnx" / "int8"),
        "onnxruntime, GPTQ int8 g32, inputs in fp32": in_onnxruntime(folder / "onnx" / "gptq-1"),
        "onnxruntime, GPTQ int8 g32, inputs int8 by block": in_onnxruntime(folder / "onnx" / "gptq-4"),
    }
    if importlib.util.find_spec("torchao"):
        made["transformers with torchao (int8, eager)"] = in_torch(loaded("torchao"))
    return made


def main(directory: str, out: str | None = None) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    export(Path(directory))
    made = programs(Path(directory))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for _ in range(ROUNDS):
        for name, once in made.items():
            taken[name].append(once())
    rows = [
        f"| program | {PROMPT} tokens read, ms | of fp32 | a token written, ms | of fp32 |",
        "|---|---|---|---|---|",
    ]
    plain: tuple[float, float] | None = None
    for name, seconds in taken.items():
        read, written = (statistics.median(each) for each in zip(*seconds, strict=True))
        plain = plain or (read, written)
        ratios = plain[0] / read, plain[1] / written
        rows.append(
            f"| {name} | {1e3 * read:.0f} | {ratios[0]:.1f} x | {1e3 * written / WRITTEN:.1f} | {ratios[1]:.1f} x |"
        )
    print("\n".join(rows))
    if out:
        Path(out).write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
