"""PACT on Fashion-MNIST: one ResNet-20 in fp32, W4A4 and W2A2, trained alike, by the same callback in a plain module.

    python benchmarks/pact_fashion_mnist.py [--data DIR] [--epochs 30] [--jobs 9] [--out benchmarks/results/NAME.md]
    python benchmarks/pact_fashion_mnist.py --limit 512 --epochs 1 --seeds 0        (a trial on a CPU)

Every run: all 60,000 training images, the same schedule, fresh weights of the same seed, accuracy on the 10,000 test
images after the last step; nothing is chosen by it. Weights W: one trained scale an output channel (LSQ), at 2 bits on
half-integer levels, which are DoReFa's of the paper. Activations A: PACT in place of each ReLU. The first and the last
layer, which the paper leaves in full precision, have 8 bits here, their inputs too. Each run is a process of its own,
``--jobs`` of them at a time: a step is a thousand small kernels, which leave a GPU idle. With --out, the course of
PACT's bounds is drawn beside the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FP32 = "fp32"
QUANTIZED: dict[str, dict[str, Any]] = {
    "W4A4": {"weight": {"format": "int4"}, "pact": {"format": "int4"}},
    "W3A3": {"weight": {"format": "int3"}, "pact": {"format": "int3"}},
    "W2A2": {"weight": {"format": "int2", "mid_rise": True}, "pact": {"format": "int2"}},
}
LEARNED_WEIGHT = {"range": "learned", "calibrate": "mse"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory of the idx files; default: where Debian's package has them")
    parser.add_argument("--precisions", nargs="+", default=[FP32, "W4A4", "W2A2"], choices=[FP32, *QUANTIZED])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="L2 on all parameters, PACT's bounds as well")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--pact-start", default="mse", help="calibrate of PACT's bounds: mse, min_max, percentile, ...")
    parser.add_argument("--from-fp32", action="store_true", help="quantized runs start from the weights of their twin")
    parser.add_argument("--scale-lr", type=float, help="of scales and bounds; default: as the weights")
    parser.add_argument("--compile", help="mode of torch.compile, such as default or reduce-overhead")
    parser.add_argument("--limit", type=int, help="so many images in an epoch and in the test")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, help="the table as markdown")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def train(asked: argparse.Namespace, precision: str, seed: int, folder: Path) -> None:
    """One run; its figures go to FOLDER/PRECISION-SEED.json, the weights of a twin beside it."""
    import lightning as L
    import torch
    from safetensors.torch import load_file, save_file

    from qtrain.callbacks.quantization_aware_training import QuantizationAwareTraining
    from qtrain.modules.quant_activation import PactActivation
    from qtrain.vision.classifier import ImageClassifier
    from qtrain.vision.config import VisionDataSection
    from qtrain.vision.datamodule import ImageData
    from qtrain.vision.resnet import ResNet

    class Bounds(L.Callback):
        """PACT's bounds before training and after each epoch, by layer."""

        def __init__(self) -> None:
            self.course: dict[str, list[float]] = {}

        def note(self, _: L.Trainer, module: L.LightningModule) -> None:
            for name, layer in module.named_modules():
                if isinstance(layer, PactActivation):
                    self.course.setdefault(name, []).append(float(layer.quantizer.alpha))

        on_train_start = on_train_epoch_end = note

    begin = time.monotonic()
    L.seed_everything(seed, verbose=False)
    torch.set_float32_matmul_precision("high")
    keys = {"path": asked.data} if asked.data else {}
    section = VisionDataSection(**keys, batch_size=asked.batch_size, validation_share=0)
    data = ImageData(section, seed=seed)
    model = ResNet(20, asked.width)
    if asked.from_fp32 and precision != FP32:
        model.load_state_dict(load_file(folder / f"{FP32}-{seed}.safetensors"))
    if asked.compile:
        model.compile(mode=asked.compile)
    module = ImageClassifier(model, lr=asked.lr, weight_decay=asked.weight_decay)
    bounds, callbacks = Bounds(), []
    if precision != FP32:
        options = QUANTIZED[precision]
        weight, pact = options["weight"] | LEARNED_WEIGHT, options["pact"] | {"calibrate": asked.pact_start}
        quantized = QuantizationAwareTraining(weight=weight, pact=pact, first_last="int8", scale_lr=asked.scale_lr)
        callbacks = [quantized, bounds]
    trainer = L.Trainer(
        max_epochs=asked.epochs,
        limit_train_batches=max(1, asked.limit // asked.batch_size) if asked.limit else None,
        limit_test_batches=max(1, asked.limit // section.eval_batch_size) if asked.limit else None,
        callbacks=callbacks,
        benchmark=True,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    seconds = time.monotonic() - begin
    measured = trainer.test(module, datamodule=data, verbose=False)[0]
    root = trainer.strategy.root_device
    found = {
        "precision": precision,
        "seed": seed,
        "accuracy": 100 * measured["test/accuracy"],
        "loss": measured["test/loss"],
        "seconds": seconds,
        "device": torch.cuda.get_device_name(root)
        if root.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "bounds": bounds.course,
    }
    if precision == FP32:
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, folder / f"{FP32}-{seed}.safetensors")
    (folder / f"{precision}-{seed}.json").write_text(json.dumps(found))


def run_all(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every run as a process; the twins first where others start from them."""
    runs = [(precision, seed) for precision in asked.precisions for seed in asked.seeds]
    first = [run for run in runs if run[0] == FP32] if asked.from_fp32 else []
    found = []
    # Torch takes all cores for each process unless it is told; here it is the GPU that computes.
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // asked.jobs))}

    def start(run: tuple[str, int]) -> dict[str, Any]:
        precision, seed = run
        one = json.dumps({"precision": precision, "seed": seed, "folder": str(folder)})
        command = [sys.executable, __file__, *sys.argv[1:], "--one", one]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode:
            raise SystemExit(f"{precision}, seed {seed}:\n{result.stderr[-3000:]}")
        content: dict[str, Any] = json.loads((folder / f"{precision}-{seed}.json").read_text())
        print(f"{precision}  seed {seed}  {content['accuracy']:.2f} %  {content['seconds']:.0f} s", flush=True)
        return content

    for batch in (first, [run for run in runs if run not in first]):
        with ThreadPoolExecutor(asked.jobs) as pool:
            found += list(pool.map(start, batch))
    return found


def table(asked: argparse.Namespace, found: list[dict[str, Any]], seconds: float) -> str:
    """Test accuracies by precision: each seed's, their mean and half their range, and how far below the twins."""
    seeds = " | ".join(f"seed {seed}" for seed in asked.seeds)
    rows = [
        "# PACT on Fashion-MNIST, ResNet-20",
        "",
        f"| test accuracy, % | {seeds} | mean ± half the range | below fp32, points |",
        "|---|" + "---|" * (len(asked.seeds) + 2),
    ]
    scores = {(run["precision"], run["seed"]): run["accuracy"] for run in found}
    for precision in asked.precisions:
        own = [scores[precision, seed] for seed in asked.seeds]
        spread = (max(own) - min(own)) / 2
        gap = "–"
        if precision != FP32 and FP32 in asked.precisions:
            gap = f"{statistics.mean(scores[FP32, seed] for seed in asked.seeds) - statistics.mean(own):+.2f}"
        cells = [f"{score:.2f}" for score in own]
        rows.append(f"| {' | '.join([precision, *cells, f'{statistics.mean(own):.2f} ± {spread:.2f}', gap])} |")
    start = "the weights of the fp32 twin" if asked.from_fp32 else "fresh weights, as the fp32 twin"
    times = ", ".join(
        f"{precision} {statistics.mean(run['seconds'] for run in found if run['precision'] == precision):.0f} s"
        for precision in asked.precisions
    )
    # Where data and table lie is of no interest to who repeats it.
    pairs = zip(["", *sys.argv[1:]], sys.argv[1:], strict=False)
    words = " ".join(word for before, word in pairs if not {before, word} & {"--data", "--out"})
    products = "fp32" if found[0]["device"].startswith("CPU") else "fp32 weights, TF32 products"
    own_lr = f" (scales and bounds {asked.scale_lr:g})" if asked.scale_lr else ""
    rows += [
        "",
        f"Width {asked.width}, {asked.epochs} epochs of {asked.limit or 60000:,} images, batch {asked.batch_size},",
        f"SGD lr {asked.lr:g}{own_lr} along a cosine to 0, momentum 0.9 (Nesterov), "
        f"weight decay {asked.weight_decay:g};",
        f"random crops of the image padded by 2 pixels and flips. Quantized runs start from {start}.",
        "First and last layer: 8 bits, weights and inputs (the paper: full precision); all else as the name says.",
        "Accuracy after the last step; no epoch, seed or setting was chosen by it.",
        f"{found[0]['device']}, torch {found[0]['torch']}, {products}, {asked.jobs} runs at a time;",
        f"each run: {times}; all {seconds:.0f} s.",
        "",
        f"    python benchmarks/pact_fashion_mnist.py {words}",
    ]
    return "\n".join(rows) + "\n"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """The course of each layer's bound, a panel for each precision, of the first seed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown: dict[str, dict[str, list[float]]] = {}
    for run in found:
        if run["bounds"]:
            shown.setdefault(run["precision"], run["bounds"])
    figure = Figure(figsize=(4.5 * len(shown), 3.5), layout="constrained")
    for axes, (precision, course) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        for number, (name, values) in enumerate(course.items()):
            color = colormaps["viridis"](number / max(1, len(course) - 1))
            axes.plot(values, color=color, label=name.removeprefix("model."))
        axes.set(title=f"{precision}: PACT's bound by layer", xlabel="epoch", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].legend(fontsize=5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def main() -> None:
    asked = arguments()
    if asked.one:
        one = json.loads(asked.one)
        train(asked, one["precision"], one["seed"], Path(one["folder"]))
        return
    if asked.from_fp32 and FP32 not in asked.precisions:
        raise SystemExit("--from-fp32 needs fp32 among --precisions")
    begin = time.monotonic()
    with TemporaryDirectory() as folder:
        found = run_all(asked, Path(folder))
    text = table(asked, found, time.monotonic() - begin)
    print(text)
    if asked.out:
        asked.out.write_text(text, encoding="utf-8")
        if any(run["bounds"] for run in found):
            draw(found, asked.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
