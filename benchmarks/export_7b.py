"""Exports of a 7B Llama shape on a CPU: the most memory a command held, and 16-bit weights a second.

    OMP_NUM_THREADS=2 python benchmarks/export_7b.py DIR [LAYERS] [CASE ...]

Makes in DIR, once, a checkpoint of random bf16 weights (Llama-2-7B's shapes; LAYERS of its 32), runs of LoRA and QLoRA
over it with random adapters of r 16, and a run of PEQA over random packed integers (int4, groups of 128): 19 GB in all.
Each case is one `qtrain export ... export.evaluate=false` in a process of its own, its memory the largest resident set
that the kernel saw. The rate is of the 16-bit weights that the model has, over the seconds that export.json tells.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from qtrain.config.compose import load_recipe, save_config
from qtrain.console import hush
from qtrain.methods.method import build_method
from qtrain.models.quantized.skeleton import empty_model
from qtrain.numerics.packing import words_of
from qtrain.numerics.spec import QuantSpec

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
SPEC = QuantSpec(format="int4", granularity="per_group", group_size=128)
UNSEEN = ["export.rounding=nearest", "export.calibration_rows=0"]
INT4 = ["export.format=compressed-tensors", "export.group_size=128", *UNSEEN]
CASES: dict[str, tuple[str, list[str]]] = {
    "LoRA, int4 g128, absmax": ("lora", [*INT4, "export.scales=absmax"]),
    "LoRA, int4 g128, mse": ("lora", [*INT4, "export.scales=mse"]),
    "QLoRA NF4, int4 g128, absmax": ("nf4", [*INT4, "export.scales=absmax"]),
    "QLoRA NF4, int4 g128, mse": ("nf4", [*INT4, "export.scales=mse"]),
    "LoRA, merged": ("lora", ["export.format=merged"]),
    "PEQA, gptq": ("peqa", ["export.format=gptq"]),
    "PEQA, compressed-tensors": ("peqa", ["export.format=compressed-tensors"]),
}


class Pool:
    """Random numbers by the piece: drawing billions would take longer than what is measured."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._numbers = torch.randn(2**26).mul_(0.02).to(torch.bfloat16)
        self._words = torch.randint(-(2**31), 2**31 - 1, (2**24,), dtype=torch.int32)
        self._at = 0

    def numbers(self, *shape: int) -> Tensor:
        return self._take(self._numbers, shape)

    def words(self, *shape: int) -> Tensor:
        return self._take(self._words, shape)

    def _take(self, pool: Tensor, shape: tuple[int, ...]) -> Tensor:
        count = torch.Size(shape).numel()
        self._at = (self._at + 12_345) % (2**22)
        repeats = -(-count // (len(pool) - self._at))
        return pool[self._at :].repeat(repeats)[:count].view(shape).clone()


def make(folder: Path, layers: int) -> None:
    """The checkpoint and the runs."""
    pool = Pool()
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=False, dtype="bfloat16")
    model = empty_model(config, torch.bfloat16)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    write(folder / "model", shapes, lambda name, shape: {name: pool.numbers(*shape)})
    config.save_pretrained(folder / "model")
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a", pad_token="a").save_pretrained(folder / "model")
    (folder / "text.txt").write_text("text")
    for name, recipe in (("lora", "lora_llama"), ("nf4", "qlora_llama")):
        words = ["method.r=16", "method.lora_alpha=16"]
        resolved = config_of(folder, name, recipe, *words)
        method = build_method(resolved.method)
        on_meta = {"compute_dtype": torch.bfloat16, "device": torch.device("meta"), "restoring": True}
        adapted = method.prepare(empty_model(config, torch.bfloat16), **on_meta)
        for part, module in adapted.named_modules():
            if part.endswith(("lora_A.default", "lora_B.default")):
                module.to_empty(device="cpu")
                module.weight.data = torch.randn_like(module.weight, dtype=torch.float32).mul_(0.01)
        method.save(adapted, folder / name / "adapter")
    resolved = config_of(folder, "peqa", "peqa_llama", "method.weight.group_size=128", "method.init=rtn")
    linears = {name for name, shape in shapes.items() if len(shape) == 2 and "layers" in name}

    def packed(name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        if name not in linears:
            return {name: pool.numbers(*shape)}
        out, columns = shape
        scale = pool.numbers(out, columns // 128).abs().add_(0.01)
        return {name: pool.words(out, words_of(columns, 4)), name.replace(".weight", ".scale"): scale.to(torch.float16)}

    write(folder / "peqa" / "base", shapes, packed)
    names = [name.removesuffix(".weight") for name in linears]
    header = {
        "quant_method": "qtrain",
        "identity": "random",
        "layers": [{"weight": SPEC.to_dict(), "inputs": None, "names": names}],
    }
    content = json.loads((folder / "model" / "config.json").read_text()) | {"quantization_config": header}
    (folder / "peqa" / "base" / "config.json").write_text(json.dumps(content))
    (folder / "peqa" / "scales").mkdir()
    scales = {
        f"{name}.scale": pool.numbers(shapes[f"{name}.weight"][0], shapes[f"{name}.weight"][1] // 128) for name in names
    }
    scales = {name: scale.abs().add_(0.01).to(torch.float16) for name, scale in scales.items()}
    save_file(scales, folder / "peqa" / "scales" / "scales.safetensors", {"format": "pt", "base": "random"})


def config_of(folder: Path, name: str, recipe: str, *words: str) -> Any:
    """The config of a run, saved as training would."""
    given = [f"model.path={folder / 'model'}", f"data.train={folder / 'text.txt'}", "data.validation=null"]
    dtypes = ["model.dtype=bf16", "method.compute_dtype=bf16"]
    (folder / name).mkdir()
    resolved = load_recipe(recipe, f"run.dir={folder / name}", *given, *dtypes, *words)
    save_config(resolved, folder / name / "config.yaml")
    return resolved


def write(folder: Path, shapes: dict[str, tuple[int, ...]], tensors_of: Callable[..., dict[str, Tensor]]) -> None:
    """Tensors into files of about 2 GB, with their index."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(batches(shapes)):
        tensors = {key: value for name in names for key, value in tensors_of(name, shapes[name]).items()}
        file = f"model-{number + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def batches(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    batch, size = [], 0
    for name, shape in shapes.items():
        batch.append(name)
        size += 2 * torch.Size(shape).numel()
        if size > 2e9:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def measure(folder: Path, case: str) -> str:
    """One command: a row of the table."""
    run, words = CASES[case]
    out = folder / "out"
    command = [sys.executable, "-m", "qtrain", "export", f"run.dir={folder / run}", f"export.dir={out}"]
    begin = time.monotonic()
    child = os.posix_spawn(sys.executable, [*command, "export.evaluate=false", *words], os.environ)
    _, status, used = os.wait4(child, 0)
    seconds = time.monotonic() - begin
    assert status == 0, case
    found = json.loads((folder / run / "export.json").read_text())[words[0].partition("=")[2]]
    read = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    shutil.rmtree(out)
    return (
        f"| {case} | {used.ru_maxrss / 2**20:.2f} | {read / 1e6 / found['seconds']:.0f} | {found['seconds']:.0f} "
        f"| {seconds:.0f} | {used.ru_utime + used.ru_stime:.0f} | {found['bytes'] / 1e9:.2f} |"
    )


def main(directory: str, layers: str = "32", *cases: str) -> None:
    hush()
    folder = Path(directory)
    if not (folder / "peqa").exists():
        make(folder, int(layers))
    print("| case | peak GiB | MB/s | export, s | command, verified, s | its CPU seconds | GB written |")
    print("|---|---|---|---|---|---|---|")
    for case in cases or CASES:
        print(measure(folder, case), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
