"""QLoRA of SmolLM2-135M on WikiText-2 and its int4 export, by the command line alone.

    python benchmarks/wikitext_qlora.py MODEL VALID.txt TEST.txt [OUT.md] [key=value ...]

Trains 200 steps of 4 x 512 tokens on VALID.txt; perplexity on the first 64 windows of 512 tokens of TEST.txt: of the
base, of the trained model, of the exported int4 as plain transformers loads it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

RUN = Path("runs/wikitext_qlora")


def qtrain(*words: str) -> None:
    command = [sys.executable, "-m", "qtrain", *words]
    print("$ qtrain", *words, flush=True)
    subprocess.run(command, check=True)


def perplexity(out: str, *words: str) -> float:
    windows = ("data.format=text", "data.max_length=512", "data.batch_size=8", "trainer.limit_val_batches=8")
    qtrain("validate", *words, *windows)
    return float(json.loads(Path(out, "validate.json").read_text())["perplexity"])


def main(model: str, valid: str, test: str, *rest: str) -> None:
    report = Path(rest[0]) if rest and rest[0].endswith(".md") else None
    overrides = [word for word in rest if "=" in word]
    begin = time.monotonic()
    base = perplexity(f"{RUN}-base", f"model.path={model}", f"data.validation={test}", f"run.dir={RUN}-base")
    settings = [
        *("data.format=text", "data.max_length=512", "data.batch_size=4", "method.r=16", "method.lora_alpha=32"),
        *("optimizer.lr=1e-3", "optimizer.schedule=cosine", "optimizer.warmup=10", "trainer.max_steps=200"),
        *("trainer.gradient_clip_val=1.0", f"run.dir={RUN}", "run.overwrite=true", *overrides),
    ]
    qtrain("fit", f"model.path={model}", f"data.train={valid}", *settings)
    trained = perplexity(str(RUN), f"run.dir={RUN}", f"data.validation={test}")
    qtrain("export", f"run.dir={RUN}")
    exported = perplexity(
        f"{RUN}-int4",
        f"model.path={RUN}/export/compressed-tensors",
        f"data.validation={test}",
        f"run.dir={RUN}-int4",
    )
    export = json.loads((RUN / "export.json").read_text())["compressed-tensors"]
    fit = json.loads((RUN / "fit.json").read_text())
    rows = [
        "| model | perplexity | ratio |",
        "|---|---|---|",
        f"| SmolLM2-135M-Instruct, as stored | {base:.2f} | |",
        f"| QLoRA r 16, NF4 base, 200 steps of 4 x 512 | {trained:.2f} | {trained / base:.3f} of the base |",
        f"| exported as int4 g32 (compressed-tensors) | {exported:.2f} | {exported / trained:.3f} of the trained |",
        "",
        f"KL of the export to the trained model, on 16 windows of the training text: {export['kl']:.4f} nats a token,",
        f"the same likeliest token at {export['top1']:.1%} of the positions.",
        f"{fit['device']}, {fit['tokens_per_second']:,.0f} tokens/s, {fit['peak_gib']:.2f} GiB;",
        f"{time.monotonic() - begin:.0f} s in all.",
        f"Settings: {' '.join(settings[: -2 - len(overrides)] + overrides)}",
    ]
    print("\n".join(rows), flush=True)
    if report:
        report.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
