"""Steps of quantization-aware training as they are, and with decoder layers replayed as CUDA graphs.

    python benchmarks/cuda_graphs.py MODEL TEXT OUT.md [--rows 16] [--length 512] [--steps 20] [SPEC ...]

MODEL is a directory or a .gguf; the teacher is the model itself (forward KL). Time of a step, how much of it the CPU
took to launch, peak memory, and the losses of the first six steps of both. On a CPU nothing is replayed.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtrain.config.compose import load_recipe
from qtrain.config.schema import Config
from qtrain.data.datamodule import LanguageData
from qtrain.training.cuda_graphs import LayerGraphs
from qtrain.training.module import LanguageModule
from qtrain.training.trained import best_device

LSQ = ["method.weight.range=learned", "method.weight.calibrate=mse"]
CACHE = "method.kv_cache={format: int4, symmetric: false, site: %s, share: %s}"
SPECS = {
    "W4 g64": [*LSQ, "method.weight.group_size=64"],
    "W4A8KV4": [*LSQ, "method.activation.format=int8", CACHE % ("pre_rope", "per_token")],
    "KV4": ["method.weight=null", CACHE % ("post_rope", "per_head")],
}
WATCHED = 6
"""Steps whose losses are compared; they also warm up."""


def measure(config: Config, steps: int, *, graphs: bool) -> dict[str, Any]:
    """Milliseconds of a step and of its launches, GiB, losses a token."""
    device = best_device()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    module = LanguageModule(config)
    data = LanguageData(config.data, module.tokenizer)
    data.setup("fit")
    model = module.build(device, data)
    module.calibrate([])
    model.train()
    batches = [
        {key: value.to(device) for key, value in batch.items()}
        for batch, _ in zip(data.train_dataloader(), range(4), strict=False)
    ]
    groups = module.method.parameter_groups(model, 1e-4)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=on_gpu)
    context = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=on_gpu)
    objective = module._objective
    assert objective is not None
    replayed = LayerGraphs()
    if graphs:
        models = [module.method.plain_model(model), *([module.teacher.model] if module.teacher else [])]
        with context():
            replayed.try_to_capture(models, partial(objective, batches[0]), device)
    losses = []

    def step(number: int) -> None:
        batch = batches[number % len(batches)]
        with context():
            loss = objective(batch)
        loss.backward()
        if number < WATCHED:
            losses.append(round(float(loss.detach()) / float(batch["loss_tokens"]), 5))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for number in range(WATCHED):
        step(number)
    _wait(on_gpu)
    begin = time.perf_counter()
    for number in range(WATCHED, WATCHED + steps):
        step(number)
    launched = time.perf_counter() - begin
    _wait(on_gpu)
    whole = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    replayed.release()
    return {"ms": whole / steps * 1e3, "launch": launched / steps * 1e3, "gib": peak, "losses": losses, "as": replayed}


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "text", "out"):
        parser.add_argument(name)
    parser.add_argument("specs", nargs="*", default=list(SPECS))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    lines = [
        "| spec | layers | ms a step | launched in | peak GiB | losses of six |",
        "|---|---|---|---|---|---|",
    ]
    for spec in asked.specs:
        keys = [f"model.path={asked.model}", f"data.train={asked.text}", f"data.max_length={asked.length}"]
        keys += [f"data.batch_size={asked.rows}", "method.name=qat", "distill.loss=forward_kl", *SPECS[spec]]
        for graphs in (False, True):
            found = measure(load_recipe(None, *keys), asked.steps, graphs=graphs)
            numbers = f"{found['ms']:.1f} | {found['launch']:.1f} | {found['gib']:.1f} | {found['losses']}"
            lines.append(f"| {spec} | {'graphs' if graphs else 'as they are'} | {numbers} |")
            print(lines[-1], flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines += ["", f"{device}, torch {torch.__version__}, {asked.rows} x {asked.length} tokens a step."]
    Path(asked.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
