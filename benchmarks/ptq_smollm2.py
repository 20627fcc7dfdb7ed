"""Post-training quantization of SmolLM2-135M: perplexity by starting point and spec, nothing trained.

    python benchmarks/ptq_smollm2.py MODEL CALIBRATION.txt TEST.txt OUT.md [NAME ...] [--rows 32] [--windows 64]

Weights of all linears but lm_head, symmetric unless the spec ends with ``a``. Calibration: the first rows of 512 tokens
of CALIBRATION.txt. Perplexity on the first windows of 512 tokens of TEST.txt. Figures that OUT.json beside OUT.md holds
already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from qtrain.config.compose import load_recipe
from qtrain.data.datamodule import LanguageData
from qtrain.evaluation.perplexity import perplexity
from qtrain.evaluation.progress import progress_over
from qtrain.models.load import load_model
from qtrain.training.module import LanguageModule
from qtrain.training.trained import best_device

SPECS: dict[str, dict[str, str]] = {
    "w4g64": {"weight": "{format: int4, group_size: 64}"},
    "w4g64a": {"weight": "{format: int4, group_size: 64, symmetric: false}"},
    "w3g64": {"weight": "{format: int3, group_size: 64}"},
    "w3g64a": {"weight": "{format: int3, group_size: 64, symmetric: false}"},
    "w2g32": {"weight": "{format: int2, group_size: 32, mid_rise: true}"},
    "w2g32a": {"weight": "{format: int2, group_size: 32, symmetric: false}"},
    "w2g64a": {"weight": "{format: int2, group_size: 64, symmetric: false}"},
    "w8a8": {"weight": "{format: int8}", "activation": "{format: int8}"},
    "w4a8": {"weight": "{format: int4}", "activation": "{format: int8}"},
    "w4a8g64": {"weight": "{format: int4, group_size: 64}", "activation": "{format: int8}"},
}
TABLE = [f"{spec}:{init}" for spec in ("w4g64a", "w3g64a", "w2g32a") for init in ("rtn", "hqq", "awq", "gptq")]
TABLE += [f"{spec}:{init}" for spec in ("w8a8", "w4a8") for init in ("rtn", "smoothquant")]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "calibration", "test", "out"):
        parser.add_argument(name)
    parser.add_argument("names", nargs="*", default=TABLE)
    parser.add_argument("--rows", default="32")
    parser.add_argument("--windows", type=int, default=64)
    asked = parser.parse_args()
    out = Path(asked.out)
    store = out.with_suffix(".json")
    known: dict[str, Any] = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    for name in ["full", *asked.names]:
        key = f"{name}, {asked.rows} rows, {asked.windows} windows"
        if key not in known:
            known[key] = measure(name, asked)
            store.write_text(json.dumps(known, indent=1), encoding="utf-8")
            print(key, known[key], flush=True)
    out.write_text(table(known), encoding="utf-8")


def measure(name: str, asked: argparse.Namespace) -> dict[str, float]:
    """Perplexity, bits a weight and seconds of one entry, ``SPEC:INIT`` or ``SPEC:INIT:KEY=VALUE``."""
    device, begin = best_device(), time.monotonic()
    keys = [f"model.path={asked.model}", f"data.train={asked.calibration}", f"data.validation={asked.test}"]
    keys += ["data.max_length=512", "method.name=ptq", f"method.calibration_rows={asked.rows}"]
    if name != "full":
        spec, init, *others = name.split(":")
        keys += [f"method.init={init}", *(f"method.{key}={value}" for key, value in SPECS[spec].items())]
        keys += [f"method.{other}" for other in others]
    config = load_recipe(None, *keys)
    module = LanguageModule(config, progress=progress_over("quantizing"))
    data = LanguageData(config.data, module.tokenizer)
    data.setup("fit")
    rows = [row for row in data.rows("validation", asked.windows) if row.shape[1] == 512][: asked.windows]
    if name == "full":
        model: Any = load_model(config.model, torch.float32, device=device)
    else:
        model = module.build(device, data)
    seconds = time.monotonic() - begin
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        found = perplexity(model, rows).perplexity
    return {"perplexity": round(found, 3), "seconds": round(seconds, 1)}


def table(known: dict[str, Any]) -> str:
    rows = ["| weights | start | perplexity | quantized in |", "|---|---|---|---|"]
    for key, found in known.items():
        name, _, rest = key.partition(", ")
        spec, _, init = name.partition(":")
        rows.append(f"| {spec} | {init or '-'} | {found['perplexity']:.2f} | {found['seconds']:.0f} s ({rest}) |")
    threads = os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))
    return "\n".join([*rows, "", f"{best_device().type}, {threads} threads, torch {torch.__version__}"]) + "\n"


if __name__ == "__main__":
    main()
