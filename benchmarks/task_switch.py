"""Tasks over one packed base: size of base and tasks, time of a switch, and the same bits after each.

    python benchmarks/task_switch.py MODEL [OUT.md]

Packs MODEL by rounding to nearest, moves its scales twice as a training would, and alternates 100 times between both.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qtrain import peqa
from qtrain.methods.method import build_method
from qtrain.methods.peqa.config import PeqaOptions
from qtrain.models.config import ModelSection
from qtrain.models.load import load_model
from qtrain.models.packed import save_packed
from qtrain.modules.packed_identity import packed_layers
from qtrain.training.trained import best_device

SPECS: dict[str, dict[str, object]] = {
    "int4 by row": {"format": "int4"},
    "int4 g64": {"format": "int4", "group_size": 64},
    "int3 g64, zero points": {"format": "int3", "group_size": 64, "symmetric": False},
    "int2 g64, zero points": {"format": "int2", "group_size": 64, "symmetric": False},
}


def main(path: str, out: str | None = None) -> None:
    rows = ["| weights | packed layers, MB | bits x weights + scales, MB | a task, MB | switch, ms | 100 switches |"]
    rows += ["|---|---|---|---|---|---|"]
    rows += [row(name, spec, path) for name, spec in SPECS.items()]
    rows.append(f"\n{best_device().type}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\n".join(rows))
    if out:
        Path(out).write_text("\n".join(rows) + "\n", encoding="utf-8")


def row(name: str, spec: dict[str, object], path: str) -> str:
    device = best_device()
    method = build_method(PeqaOptions.model_validate({"init": "rtn", "weight": spec}))
    base = load_model(ModelSection(path=path), torch.float32)
    model = method.plain_model(method.prepare(base, compute_dtype=torch.float32, device=device))
    layers = packed_layers(model)
    expected = sum(
        layer.out_features * layer.in_features * layer.spec.bits / 8
        + layer.scale.numel() * (2 + (0 if layer.spec.symmetric else layer.spec.bits / 8))
        for layer in layers.values()
    )
    with tempfile.TemporaryDirectory() as folder:
        save_packed(model, Path(folder) / "base")
        plain = sum(p.nbytes for n, p in model.named_parameters() if not any(n.startswith(f"{k}.") for k in layers))
        whole = sum(file.stat().st_size for file in (Path(folder) / "base").glob("*.safetensors"))
        files = [peqa.save_scales(moved(model, seed), Path(folder) / str(seed)) for seed in (1, 2)]
        tasks = [peqa.load_scales(file, device) for file in files]
        size = files[0].stat().st_size
    ids = torch.arange(3, 35, device=device)[None]
    first = [logits(model, task, ids) for task in tasks]
    times, same = [], 0
    for turn in range(100):
        begin = time.perf_counter()
        peqa.switch(model, tasks[turn % 2])
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        with torch.no_grad():
            same += torch.equal(model(input_ids=ids).logits, first[turn % 2])
    measured = (whole - plain) / 1e6
    surplus = f"{1e8 * measured / expected - 100:+.2f} %"
    return (
        f"| {name} | {measured:.2f} | {expected / 1e6:.2f} ({surplus}) | {size / 1e6:.2f} "
        f"| {1e3 * statistics.median(times):.2f} | {same} bit-equal |"
    )


@torch.no_grad()
def moved(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Scales as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in packed_layers(model).values():
        layer.scale.mul_(1 + 0.05 * torch.randn(layer.scale.shape, generator=generator).to(layer.scale.device))
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, task: peqa.Scales, ids: torch.Tensor) -> torch.Tensor:
    peqa.switch(model, task)
    found: torch.Tensor = model(input_ids=ids).logits
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
