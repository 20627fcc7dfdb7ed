"""Static ranges beside dynamic ones, W8A8, untrained: perplexity of SmolLM2-135M with each way to find the ranges.

    python benchmarks/w8a8_static.py MODEL CALIBRATION.txt TEST.txt [OUT.md] [WINDOWS]

Weights int8 by row. Inputs int8: by token from their own extremes; or one range a layer, found on 32 rows of 512 tokens
of CALIBRATION.txt. Perplexity on the first 64 windows of 512 tokens of TEST.txt, full precision beside.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from qtrain.config.compose import load_recipe
from qtrain.data.datamodule import LanguageData
from qtrain.evaluation.perplexity import perplexity
from qtrain.modules.quantizers import full_precision
from qtrain.training.module import LanguageModule
from qtrain.training.trained import best_device

SMOOTH = ["method.init=smoothquant", "method.calibration_rows=32"]
HARD = [*SMOOTH, "method.smoothquant={alpha: 0.8}"]
WAYS: dict[str, tuple[str, list[str]]] = {
    "dynamic, by token": ("{format: int8}", []),
    "dynamic, by token, smoothed": ("{format: int8}", SMOOTH),
    "static, KL": ("{format: int8, range: static, calibrate: kl}", []),
    "static, MSE": ("{format: int8, range: static, calibrate: mse}", []),
    "static, 99.99 %": ("{format: int8, range: static, calibrate: percentile}", []),
    "static, min-max": ("{format: int8, range: static, calibrate: min_max}", []),
    "static asymmetric, min-max": ("{format: int8, range: static, symmetric: false}", []),
    "static, KL, smoothed": ("{format: int8, range: static, calibrate: kl}", SMOOTH),
    "static, MSE, smoothed": ("{format: int8, range: static, calibrate: mse}", SMOOTH),
    "static, min-max, smoothed": ("{format: int8, range: static, calibrate: min_max}", SMOOTH),
    "static, KL, smoothed by 0.8": ("{format: int8, range: static, calibrate: kl}", HARD),
    "static, MSE, smoothed by 0.8": ("{format: int8, range: static, calibrate: mse}", HARD),
    "static, min-max, smoothed by 0.8": ("{format: int8, range: static, calibrate: min_max}", HARD),
}


def main(model: str, calibration: str, test: str, out: str | None = None, windows: str = "64") -> None:
    rows = ["| inputs | perplexity | of dynamic |", "|---|---|---|"]
    device, dynamic = best_device(), 0.0
    for name, (activation, own) in WAYS.items():
        begin = time.monotonic()
        config = load_recipe(
            None,
            *(f"model.path={model}", f"data.train={calibration}", f"data.validation={test}", "data.max_length=512"),
            *("method.name=qat", "method.weight.format=int8", f"method.activation={activation}", *own),
        )
        module = LanguageModule(config)
        data = LanguageData(config.data, module.tokenizer)
        data.setup("fit")
        held_out = [row for row in data.rows("validation", int(windows)) if row.shape[1] == 512][: int(windows)]
        built = module.build(device, data)
        module.calibrate(data.rows("train", 32))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            if not dynamic:
                with full_precision(built):
                    rows.append(f"| full precision | {perplexity(built, held_out).perplexity:.3f} | |")
            found = perplexity(built, held_out).perplexity
        dynamic = dynamic or found
        rows.append(f"| {name} | {found:.3f} | {found / dynamic:.4f} |")
        print(rows[-1], f"{time.monotonic() - begin:.0f} s", flush=True)
    rows.append(f"\n{windows} windows, {device.type}, torch {torch.__version__}")
    print("\n".join(rows))
    if out:
        Path(out).write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
