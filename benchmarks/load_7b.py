"""Seconds and memory until a checkpoint of a 7B Llama shape stands quantized, its layers read one by one or at once.

    python -m benchmarks.load_7b DIR [CASE ...] [--dtype fp32] [--layers 32 --hidden 4096 --intermediate 11008
        --heads 32 --vocab 32000 --shard-gb 2]

Makes in DIR, once, random bf16 weights, a layer at a time, in shards; 13.5 GB as it stands, 0.3 GB by `--layers 12
--hidden 1024 --intermediate 2816 --heads 16 --shard-gb 0.1`. Each case is a process of its own that begins with a tiny
model, so that what libraries load is there before. Peaks are above what the process holds then: of the host its
resident set (mapped files included), of a GPU what PyTorch allocated. Bound: the quantized model, the largest shard and
one decoder layer in the checkpoint's dtype. The files come from the page cache, unless DIR is larger than memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtrain.console import hush, table
from qtrain.files import atomic_directory, write_json
from qtrain.methods.base import load_base, load_for
from qtrain.methods.config import MethodSection
from qtrain.methods.method import build_method
from qtrain.methods.peqa.config import PeqaOptions
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.models.config import ModelSection
from qtrain.models.dtype import DTYPES
from qtrain.training.trained import best_device

GIB = 2**30
BASES: dict[str, MethodSection] = {
    "nf4": QLoraOptions(),
    "int8": QLoraOptions(base="int8"),
    "packed": QLoraOptions.model_validate({"base": "packed", "packed": {"init": "rtn", "weight": {"group_size": 64}}}),
    "peqa": PeqaOptions.model_validate({"init": "rtn"}),
}
CASES = [f"{base}-{how}" for base in BASES for how in ("read", "whole")]


def make(directory: Path, config: LlamaConfig, shard_bytes: float) -> None:
    """config.json and shards; no more than one of them in memory, as random as one layer is."""
    with torch.device("meta"):
        shapes = {name: one.shape for name, one in LlamaForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    pool = torch.randn(2 * max(shape.numel() for shape in shapes.values())).mul_(0.02).to(torch.bfloat16)
    shards = list(_shards(shapes, shard_bytes))
    places: dict[str, str] = {}
    with atomic_directory(directory) as made:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            begins = {name: (7919 * len(places) + 104_729 * i) % (len(pool) // 2) for i, name in enumerate(names)}
            tensors = {name: pool[begins[name] :][: shapes[name].numel()].view(shapes[name]).clone() for name in names}
            save_file(tensors, made / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
        write_json(made / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
        config.save_pretrained(made)


def _shards(shapes: dict[str, torch.Size], size: float) -> Iterator[list[str]]:
    names: list[str] = []
    for name in shapes:
        if names and 2 * sum(shapes[one].numel() for one in [*names, name]) > size:
            yield names
            names = []
        names.append(name)
    yield names


def load(directory: Path, case: str, dtype: torch.dtype) -> nn.Module:
    """As `qtrain fit` does it, or its weights whole first."""
    base, _, how = case.partition("-")
    method, section, device = build_method(BASES[base]), ModelSection(path=str(directory)), best_device()
    asked: dict[str, Any] = {"compute_dtype": dtype, "device": device}
    if how == "whole":
        model = load_base(section, method.options, dtype, **asked)
    else:
        found = load_for(method, section, dtype, **asked)
        assert found.loading == "each layer quantized as it was read", found.loading
        model = found.model
    return method.prepare(model, **asked)


def measure(directory: Path, case: str, dtype: torch.dtype) -> dict[str, float]:
    """Figures of one case, of this process."""
    gpu = best_device().type == "cuda"
    with TemporaryDirectory() as warm:
        tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
        make(Path(warm) / "tiny", LlamaConfig.from_dict({**tiny, "vocab_size": 64}), 1e9)
        load(Path(warm) / "tiny", case, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark falls to what is resident
    before = _resident("VmHWM")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        begun = torch.cuda.memory_allocated()
    begin = time.monotonic()
    model = load(directory, case, dtype)
    if gpu:
        torch.cuda.synchronize()
    seconds = time.monotonic() - begin
    figures = {"seconds": seconds, "final": held(model), "host": _resident("VmHWM") - before}
    return figures | ({"gpu": torch.cuda.max_memory_allocated() - begun} if gpu else {})


def held(model: nn.Module) -> int:
    """Bytes of the model: parameters, buffers, and the scales that libraries keep elsewhere."""
    tensors = [*model.state_dict().values(), *model.buffers()]
    return sum({one.data_ptr(): one.nbytes for one in tensors if isinstance(one, Tensor)}.values())


def _resident(what: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[what].split()[0])


def sizes(directory: Path) -> tuple[int, int, int]:
    """Bytes of all shards, of the largest, and of one decoder layer."""
    files = [file.stat().st_size for file in directory.glob("*.safetensors")]
    config = LlamaConfig.from_pretrained(directory)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    layer = sum(2 * one.numel() for name, one in state.items() if re.search(r"\.layers\.0\.", name))
    return sum(files), max(files), layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of what is not quantized")
    for key, value in {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "vocab": 32000}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--shard-gb", type=float, default=2.0)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    hush()
    if asked.alone:
        print(json.dumps(measure(asked.directory, asked.cases[0], DTYPES[asked.dtype])))
        return
    shape = {"hidden_size": asked.hidden, "intermediate_size": asked.intermediate, "vocab_size": asked.vocab}
    shape |= {"num_hidden_layers": asked.layers, "num_attention_heads": asked.heads}
    config = LlamaConfig.from_dict({**shape, "dtype": "bfloat16"})
    if not asked.directory.exists():
        make(asked.directory, config, asked.shard_gb * 1e9)
    total, shard, layer = sizes(asked.directory)
    rows = []
    for case in asked.cases or CASES:
        command = [sys.executable, "-m", "benchmarks.load_7b", str(asked.directory), case]
        done = subprocess.run(
            [*command, "--dtype", asked.dtype, "--alone"], stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        peak, bound = found.get("gpu", found["host"]), found["final"] + shard + layer
        figures = [found["final"], bound, found["host"], *([found["gpu"]] if "gpu" in found else [])]
        rows.append([case, f"{found['seconds']:.1f}", f"{total / 1e6 / found['seconds']:,.0f}"])
        rows[-1] += [*(f"{figure / GIB:.3f}" for figure in figures), f"{peak / bound:.2f}"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    columns = ["case", "s", "MB/s", "model GiB", "bound", "host peak", *(["GPU peak"] if device != "CPU" else [])]
    table(f"{total / 1e9:.2f} GB in bf16, on {device}", [*columns, "peak / bound"], rows)


if __name__ == "__main__":
    main()
