"""QLoRA of the 70B shape under FSDP2 on two GPUs: 1 x 1024 tokens a process, everything recomputed.

    python -m benchmarks.gpu.fsdp_70b OUT.json [--tiny]

Each process quantizes random weights layer by layer on its GPU, all 80 of them, and keeps its share then. Every step
has the same rows: their loss has to fall, and the first layer's codes, gathered again, have to be what they were.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.gpu.measure import Sizes, device_name, peak_gib, quiet, random_batches, shape_of, versions
from benchmarks.gpu.models import repeated_model
from benchmarks.gpu.shapes import LLAMA_70B
from benchmarks.gpu.training import counted
from qtrain.callbacks.throughput import Throughput
from qtrain.config.compose import load_recipe
from qtrain.console import say
from qtrain.files import write_json
from qtrain.training import processes
from qtrain.training.module import LanguageModule
from qtrain.training.sharding import ShardedStrategy, unshard
from qtrain.training.trainer import trainer_arguments

WORDS = (
    *("method.name=qlora", "method.r=64", "optimizer.name=adamw", "optimizer.lr=1e-3", "run.recompute=full"),
    *("data.packing=false", "trainer.gradient_clip_val=0.3", "trainer.strategy=fsdp2", "trainer.devices=2"),
)


class _Losses(Callback):
    """Of each step, in nats a token."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Wait for it."""
        self.found.append(float(trainer.callback_metrics["train/loss"]))


@processes.end_together()
def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Make, share out, train, compare."""
    begin = time.monotonic()
    shape, size = shape_of(LLAMA_70B, asked), Sizes(1, 64, 1, 4) if asked.tiny else Sizes(1, 1024, 2, 6)
    words = [*WORDS, f"data.batch_size={size.rows}", f"data.max_length={size.length}"]
    words += [f"trainer.max_steps={size.warm + size.steps}", *(["trainer.accelerator=cpu"] if asked.tiny else [])]
    config = load_recipe(None, *words)
    torch.set_float32_matmul_precision(config.run.matmul_precision)
    meter, losses = Throughput(every_n_steps=1, warmup_steps=size.warm), _Losses()
    arguments = trainer_arguments(config, callbacks=[meter, losses], logger=False, enable_checkpointing=False)
    trainer = L.Trainer(**{**arguments, "enable_progress_bar": False})
    processes.join(trainer, L.LightningModule(), config.trainer)
    say(f"{processes.size()} processes after {time.monotonic() - begin:.0f} s")
    module = LanguageModule(config, base=repeated_model(shape))
    module.trainer = trainer
    module.build(trainer.strategy.root_device)
    assert isinstance(trainer.strategy, ShardedStrategy) and module.model is not None and module.recompute is not None
    first = module.recompute.layers[0]
    codes = _codes(first)
    if any(others != codes for others in processes.gather(codes)):
        raise SystemExit("the processes made different codes")
    made = {"made_gib": peak_gib(), "made_seconds": round(time.monotonic() - begin, 1)}
    module.shard(trainer.strategy.device_mesh["data_parallel"])
    made["held_gib"] = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else None
    say(f"made and shared out after {time.monotonic() - begin:.0f} s: {made}")
    batch = counted(random_batches(shape.vocab, size)[processes.rank()])
    trainer.fit(module, DataLoader([batch] * (size.warm + size.steps), batch_size=None))  # type: ignore[arg-type]
    say(f"trained after {time.monotonic() - begin:.0f} s: {losses.found}")
    unshard(first)
    if _codes(first) != codes:
        raise SystemExit("the first layer's codes are not what they were")
    if losses.found[-1] >= losses.found[0]:
        raise SystemExit(f"the loss did not fall: {losses.found}")
    rate = meter.tokens_per_second
    assert rate is not None
    return {
        "tokens_per_second": rate,
        "peak_gib": max(processes.gather(meter.peak_gib or 0.0)),
        "tflops": rate * shape.flops_per_token(trains=False) / 1e12,
        **made,
        "losses": losses.found,
        "codes_compared": len(codes),
        "said": [*module.method.lines(module.model), module.fused, module.loss_path, str(module.blocks)],
        "seconds": round(time.monotonic() - begin, 1),
        "device": device_name(),
        "versions": versions(),
    }


def _codes(layer: nn.Module) -> dict[str, int]:
    """CRC-32 of the bytes of each packed weight."""
    weights = {name: parameter for name, parameter in layer.named_parameters() if parameter.dtype == torch.uint8}
    return {name: processes.checksum(parameter) for name, parameter in weights.items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a small model on two processes of a CPU")
    asked = parser.parse_args()
    found = measure(asked)
    if not processes.rank():
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(asked.out, found)


if __name__ == "__main__":
    quiet()
    main()
