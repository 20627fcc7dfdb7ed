"""Quantization-aware training of SmolLM2-135M on text that it wrote itself; perplexities before, untrained and after.

    qtrain generate-data model.path=MODEL generate_data.dir=TOKENS generate_data.batch_size=4096
    python benchmarks/qat_smollm2.py MODEL TOKENS TEST.txt OUT.md [--other TEXT.txt] [NAME ...] [key=value ...]

Runs each named spec (default: all) as `qtrain fit` in a process of its own, all at the same time on one GPU, whose
small kernels leave it idle otherwise; a name may carry keys of its own, w4g64@optimizer.lr=1e-4,trainer.max_steps=800.
Perplexity on the first 64 windows of 512 tokens of TEST.txt, and with --other of another text. Share recovered =
1 - ln(QAT / full) / ln(PTQ / full), PTQ by absmax and rounding to nearest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path("runs/qat_smollm2")
ROWS = "method.weight.range=learned method.weight.calibrate=mse"
KV4 = "{format: int4, symmetric: false, site: %s, share: %s, smooth: true}"
SMOOTH = "method.init=smoothquant method.smoothquant.alpha=0.8 method.weight.format=int8 method.weight.range=learned"
STATIC = "{format: int8, range: static, calibrate: kl}"
TRAINED = "{format: int8, granularity: per_tensor, range: learned, calibrate: mse}"
SPECS: dict[str, tuple[str, list[str]]] = {
    "w4a8kv4-pre": (
        "W4 row, A8 token, KV4 before RoPE, all heads",
        [*ROWS.split(), "method.activation.format=int8", f"method.kv_cache={KV4 % ('pre_rope', 'per_token')}"],
    ),
    "w4a8kv4-post": (
        "W4 row, A8 token, KV4 after RoPE, per head",
        [*ROWS.split(), "method.activation.format=int8", f"method.kv_cache={KV4 % ('post_rope', 'per_head')}"],
    ),
    "w4g64": ("W4 g64", [*ROWS.split(), "method.weight.group_size=64"]),
    "w3g64": ("W3 g64", [*ROWS.split(), "method.weight.group_size=64", "method.weight.format=int3"]),
    "w2g32": (
        "W2 g32, half-integer levels",
        [*ROWS.split(), "method.weight.group_size=32", "method.weight.format=int2", "method.weight.mid_rise=true"],
    ),
    "w8a8": ("W8 row, A8 token", [*SMOOTH.split(), "method.activation.format=int8"]),
    "w8a8-static": ("W8 row, A8 static", [*SMOOTH.split(), f"method.activation={STATIC}"]),
    "w8a8-trained": ("W8 row, A8 trained range", [*SMOOTH.split(), f"method.activation={TRAINED}"]),
    "kv4-pre": (
        "KV4 before RoPE, per head",
        ["method.weight=null", f"method.kv_cache={KV4 % ('pre_rope', 'per_head')}"],
    ),
    "kv4": ("KV4 after RoPE, per head", ["method.weight=null", f"method.kv_cache={KV4 % ('post_rope', 'per_head')}"]),
}


def directory_of(name: str) -> Path:
    return ROOT / name.replace(",", "_").replace("=", "-")


def start(name: str, model: str, tokens: str, test: str, overrides: list[str]) -> tuple[subprocess.Popen[bytes], Path]:
    spec, _, own = name.partition("@")
    directory = directory_of(name)
    directory.mkdir(parents=True, exist_ok=True)
    words = [
        *(f"model.path={model}", f"data.train={tokens}", f"data.validation={test}", "data.max_length=512"),
        *("data.batch_size=16", "data.eval_batch_size=16", "trainer.limit_val_batches=4", "method.name=qat"),
        *(
            "distill.loss=forward_kl",
            "optimizer.schedule=cosine",
            "optimizer.warmup=0.03",
            "optimizer.betas=[0.9,0.95]",
        ),
        *("optimizer.lr=2e-4", "method.scale_lr=5e-4", "trainer.max_steps=1600", "trainer.gradient_clip_val=1.0"),
        *SPECS[spec][1],
        "export.format=merged",  # holds every spec
        *overrides,
        *((key.replace(";", ",") for key in own.split(",")) if own else []),
        *(f"run.dir={directory}", "run.overwrite=true", "run.keep=1"),
    ]
    log = (directory / "log.txt").open("wb")
    command = [sys.executable, "-W", "ignore", "-m", "qtrain", "fit", *words]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), directory


def other_text(directory: Path, text: str) -> dict[str, float]:
    """Perplexities on another text: of the base, of rounding to nearest, of the trained model."""
    import torch

    from qtrain.config.compose import load_recipe
    from qtrain.data.datamodule import LanguageData
    from qtrain.evaluation.perplexity import perplexity
    from qtrain.training.module import LanguageModule
    from qtrain.training.run_directory import RunDirectory
    from qtrain.training.trained import best_device

    config = load_recipe(directory / "config.yaml", f"data.validation={text}", "distill.loss=none", "method.init=null")
    module = LanguageModule(config)
    data = LanguageData(config.data, module.tokenizer)
    data.setup("fit")  # smoothed keys look at rows of the training text
    rows = [row for row in data.rows("validation", 64) if row.shape[1] == config.data.max_length][:64]
    model = module.build(best_device(), data)
    found = {}
    with torch.autocast(best_device().type, dtype=torch.bfloat16, enabled=best_device().type == "cuda"):
        for name, entered in module.method.baselines(model).items():
            with entered():
                found[name] = perplexity(model, rows).perplexity
        trained = RunDirectory(directory).trained
        assert trained is not None
        module.method.restore(model, trained)
        found["qat"] = perplexity(model, rows).perplexity
    return found


def measured(directories: list[Path], text: str) -> dict[Path, dict[str, float]]:
    """``other_text`` of several runs, each in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", text]
    running = {d: subprocess.Popen([*command, str(d)], stdout=subprocess.PIPE, text=True) for d in directories}
    found = {}
    for directory, process in running.items():
        try:
            out, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            continue
        if not process.returncode:
            found[directory] = json.loads(out.splitlines()[-1])
    return found


def row(title: str, found: dict[str, Any], note: str) -> str:
    share = f"{found['share']:.1%}" if found.get("share") is not None else "-"
    return f"| {title} | {found['full']:.2f} | {found['ptq']:.2f} | {found['qat']:.2f} | {share} | {note} |"


def main(words: list[str]) -> None:
    other = None
    if "--other" in words:
        at = words.index("--other")
        other = words[at + 1]
        words = words[:at] + words[at + 2 :]
    model, tokens, test, out, *rest = words
    names = [word for word in rest if word.partition("@")[0] in SPECS] or list(SPECS)
    overrides = [word for word in rest if word not in names]
    begin = time.monotonic()
    running = {name: start(name, model, tokens, test, overrides) for name in names}
    failed = [name for name, (process, _) in running.items() if process.wait()]
    for name in failed:
        print(f"== {name} failed\n" + (directory_of(name) / "log.txt").read_text()[-3000:], flush=True)
    from qtrain.evaluation.recovery import Recovery

    for name in names:
        if name not in failed:
            fit = json.loads((directory_of(name) / "fit.json").read_text())
            print(name, fit["recovery"], f"{fit['steps']} steps, {fit['train_seconds']} s", flush=True)
    done = [name for name in names if name not in failed]
    others = measured([directory_of(name) for name in done], other) if other else {}
    lines = ["| spec | full | PTQ | QAT | recovered | |", "|---|---|---|---|---|---|"]
    for name in done:
        fit = json.loads((directory_of(name) / "fit.json").read_text())
        title = " ".join([SPECS[name.partition("@")[0]][0], name.partition("@")[2]]).strip()
        note = f"start {fit['val_perplexity_before']:.2f}, {fit['steps']} steps, {fit['train_seconds']:.0f} s"
        lines.append(row(title, fit["recovery"], note))
        if directory_of(name) in others:
            found = others[directory_of(name)]
            share = Recovery(found["full"], found["ptq"], found["qat"]).share
            lines.append(row(f"&nbsp; the same on {Path(other).stem}", found | {"share": share}, ""))
    devices = sorted({json.loads(file.read_text())["device"] for file in ROOT.glob("*/fit.json")})
    lines += ["", f"{', '.join(devices)}; {len(names)} runs at the same time, {time.monotonic() - begin:.0f} s in all."]
    lines.append(f"Overrides: {' '.join(overrides) or 'none'}; os cpus {os.cpu_count()}.")
    print("\n".join(lines), flush=True)
    Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(other_text(Path(sys.argv[3]), sys.argv[2])))
    else:
        main(sys.argv[1:])
