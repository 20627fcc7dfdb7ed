"""PEQA beside LoRA and LoRA followed by quantization, at equal steps: the table of the PEQA paper on SmolLM2-135M.

    python benchmarks/peqa_smollm2.py MODEL TRAIN.txt TEST.txt OUT.md [NAME ...] [key=value ...]

Trained on windows of 512 tokens of TRAIN.txt; perplexity on the first 64 windows of 512 tokens of TEST.txt. Adapters:
r 16 on every linear layer, merged, then quantized by RTN or GPTQ. PEQA: scales alone, over GPTQ's or HQQ's integers.
Keys go to every training; a name takes keys of its own: ``peqa4@optimizer.lr=2e-4;method.calibration_rows=64``. Runs
lie in OUT's directory; a run that is there already is only measured.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtrain.config.compose import load_recipe
from qtrain.config.schema import Config
from qtrain.data.datamodule import LanguageData
from qtrain.evaluation.perplexity import perplexity
from qtrain.evaluation.progress import progress_over
from qtrain.models.load import load_model, load_tokenizer
from qtrain.training.api import export_run
from qtrain.training.fit import fit
from qtrain.training.module import LanguageModule
from qtrain.training.run_directory import RunDirectory
from qtrain.training.trained import best_device, trained_module

LORA = ["method.name=qlora", "method.base=none", "method.r=16", "method.lora_alpha=32", "optimizer.lr=1e-3"]
PEQA = ["method.name=peqa", "optimizer.lr=1e-4"]
INT4 = "method.weight={format: int4, group_size: 64, symmetric: false}"
INT3 = "method.weight={format: int3, group_size: 64, symmetric: false}"
INT2 = "method.weight={format: int2, group_size: 64, symmetric: false}"
BLOCKS = "method.block_ap={rows: 512, epochs: 2, batch_size: 4}"
TRAINED = {
    "lora": LORA,
    "peqa4": [*PEQA, INT4],
    "peqa4-hqq": [*PEQA, INT4, "method.init=hqq"],
    "peqa3": [*PEQA, INT3],
    "peqa3-hqq": [*PEQA, INT3, "method.init=hqq"],
    "efficientqat2": [*PEQA, INT2, "method.init=block_ap", BLOCKS],
}
QUANTIZED = {
    "lora+rtn4": ["method.init=rtn", INT4],
    "lora+gptq4": ["method.init=gptq", INT4],
    "lora+gptq3": ["method.init=gptq", INT3],
}
UNTRAINED = {
    "gptq4": ["method.init=gptq", INT4],
    "gptq3": ["method.init=gptq", INT3],
    "gptq2": ["method.init=gptq", INT2],
}
TRAINING = [
    *("data.max_length=512", "data.batch_size=8", "trainer.max_steps=200", "optimizer.schedule=cosine"),
    *("optimizer.warmup=10", "trainer.gradient_clip_val=1.0", "trainer.limit_val_batches=1"),
]


@dataclass
class Bench:
    """Files, keys and what was found."""

    model: str
    train: str
    test: str
    folder: Path
    keys: list[str]

    def config(self, *keys: str) -> Config:
        """A config on these files."""
        data = [f"data.train={self.train}", f"data.validation={self.test}", "data.format=text"]
        return load_recipe(None, f"model.path={self.model}", *data, *TRAINING, *keys, *self.keys)

    def trained(self, name: str, own: list[str]) -> dict[str, float]:
        """Fit, if it is not there, and measure."""
        run = RunDirectory(self.folder / name)
        config = self.config(*TRAINED[name], f"run.dir={run.path}", *own)
        begin = time.monotonic()
        if run.trained is None:
            fit(config, run)
        seconds = time.monotonic() - begin
        module = trained_module(config, run, best_device())
        assert module.model is not None
        count = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
        return self.measured(module.method.plain_model(module.model)) | {"trained": count, "seconds": seconds}

    def quantized(self, keys: list[str], model: str) -> dict[str, float]:
        """Quantize ``model`` after its training, and measure."""
        begin = time.monotonic()
        config = self.config("method.name=ptq", "method.calibration_rows=64", *keys).model_copy()
        config.model.path = model
        module = LanguageModule(config, progress=progress_over("quantizing"))
        data = LanguageData(config.data, module.tokenizer)
        data.setup("fit")
        found = module.build(best_device(), data)
        return self.measured(found) | {"seconds": time.monotonic() - begin}

    def merged(self) -> str:
        """The adapters of ``lora`` in 16 bits, as a directory."""
        run = RunDirectory(self.folder / "lora")
        directory = self.folder / "lora-merged"
        if not directory.exists():
            keys = ["export.format=merged", f"export.dir={directory}", "export.evaluate=false", "export.dtype=fp32"]
            export_run(self.config(*LORA, f"run.dir={run.path}", *keys))
        return str(directory)

    def measured(self, model: nn.Module) -> dict[str, float]:
        """Perplexity on the first 64 windows."""
        config = self.config()
        data = LanguageData(config.data, load_tokenizer(config.model))
        data.setup("validate")
        rows = [row for row in data.rows("validation", 64) if row.shape[1] == 512][:64]
        device = best_device()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            return {"perplexity": perplexity(model, rows).perplexity}


def main(model: str, train: str, test: str, out: str, *words: str) -> None:
    keys = [word for word in words if "=" in word and "@" not in word]
    own = {name: rest.split(";") for name, _, rest in (word.partition("@") for word in words if "@" in word)}
    asked = [word.partition("@")[0] for word in words if word not in keys]
    asked = asked or [*TRAINED, *QUANTIZED, *UNTRAINED]
    bench = Bench(model, train, test, Path(out).parent / "runs", keys)
    rows = ["| model | perplexity | trained parameters | s |", "|---|---|---|---|"]
    found: dict[str, Any] = {
        "as stored": bench.measured(load_model(bench.config().model, torch.float32, device=best_device()))
    }
    for name in asked:
        if name in TRAINED:
            found[name] = bench.trained(name, own.get(name, []))
        elif name in QUANTIZED:
            found[name] = bench.quantized(QUANTIZED[name], bench.merged())
        else:
            found[name] = bench.quantized(UNTRAINED[name], model)
        print(name, found[name], flush=True)
    for name, it in found.items():
        count = f"{it['trained']:,}" if "trained" in it else ""
        rows.append(f"| {name} | {it['perplexity']:.2f} | {count} | {it.get('seconds', 0):.0f} |")
    rows.append(f"\n{best_device().type}, torch {torch.__version__}; {' '.join([*TRAINING, *keys])}")
    Path(out).write_text("\n".join(rows) + "\n", encoding="utf-8")
    print("\n".join(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
