"""A layer of the 7B's width: qtrain's fused path, the same layers unfused, and those under torch.compile.

    python -m benchmarks.compiled_layers [OUT.md] [--tiny] [--tokens 8192] [--rounds 12] [--backend inductor]

LoRA r 64 over NF4 (without dropout), and QAT W4 g32 of weights in fp32; forward and backward in bf16 under autocast,
medians of rounds in which all take turns. Fused: qtrain's blocks or one-pass quantizers, liger-kernel's layers. Graph
breaks are counted by torch._dynamo.explain; without any the compiled layer is one graph (fullgraph). "peak" is what the
allocator held at most beyond what lay there before; "apart" the largest |y - y_unfused| / |y_unfused| of the output,
and of the gradient of the input. Without a GPU all is fp32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.gpu.measure import device_name
from benchmarks.qlora_blocks import CONTEXT, DEVICE, DTYPE, ON_GPU, SHAPE, TINY, layer_of, peak_bytes, timed
from benchmarks.result_file import free_name
from qtrain.models.fused import fuse_layers
from qtrain.modules.config import WeightSection
from qtrain.modules.frozen_linear import linears
from qtrain.modules.quant_linear import QuantLinear

W4_G32 = WeightSection(format="int4", group_size=32)
HEAD = ("layer", "as", "ms", "unfused / it", "peak MiB", "graph breaks", "first run, s", "apart")
Run = Callable[[], Tensor]


def qlora(fused: bool, asked: Namespace) -> tuple[PreTrainedModel, str]:
    """LoRA over NF4, and what runs in it."""
    return layer_of("nf4", 0.0, "auto" if fused else "none", Namespace(tiny=asked.tiny, liger=fused))


def qat(fused: bool, asked: Namespace) -> tuple[PreTrainedModel, str]:
    """Fake-quantized weights, and what runs in it."""
    torch.manual_seed(0)
    with DEVICE:
        model: Any = LlamaForCausalLM(
            LlamaConfig(**(TINY if asked.tiny else SHAPE), num_hidden_layers=1, vocab_size=256)
        )
    for name, linear in list(linears(model)):
        layer = QuantLinear.from_linear(linear, W4_G32, None)
        layer.kernels = "triton" if fused else "plain"
        model.set_submodule(name, layer)
    words = fuse_layers(model, DEVICE, "auto" if fused else "none")
    return model.train(), f"quantizers {'one-pass' if fused and ON_GPU else 'plain'}; layers {words}"


LAYERS = {"QLoRA NF4 r 64": qlora, "QAT W4 g32": qat}


def layer_run(model: Any, x: Tensor) -> Run:
    """Its first layer alone, causal."""
    decoder = model.get_decoder()
    layer = decoder.layers[0]
    turned = decoder.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])

    def run() -> Tensor:
        with CONTEXT():
            y = layer(x, attention_mask=None, position_embeddings=turned)
        return y if isinstance(y, Tensor) else y[0]

    return run


def breaks_of(run: Run) -> int:
    """Graph breaks of the forward."""
    torch._dynamo.reset()
    found: int = torch._dynamo.explain(run)().graph_break_count
    torch._dynamo.reset()
    return found


def results(run: Run, x: Tensor, upper: Tensor) -> list[Tensor]:
    """Output, and gradient of the input."""
    x.grad = None
    y = run()
    y.backward(upper)
    assert x.grad is not None
    return [y.detach(), x.grad.detach().clone()]


def rows_of(name: str, asked: Namespace, x: Tensor, upper: Tensor) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and notes."""
    ways: dict[str, Run] = {}
    models, notes, begun = dict[str, Any](), list[str](), dict[str, float]()
    for way in ("unfused", "fused"):
        models[way], words = LAYERS[name](way == "fused", asked)
        notes.append(f"{name}, {way}: {words}")
        ways[way] = layer_run(models[way], x)
    breaks = breaks_of(ways["unfused"])
    compiled = f"unfused, torch.compile{' fullgraph' if breaks == 0 else ''}"
    ways[compiled] = torch.compile(ways["unfused"], backend=asked.backend, dynamic=False, fullgraph=breaks == 0)
    models[compiled] = models["unfused"]
    times: dict[str, list[float]] = {way: [] for way in ways}
    apart, wanted = {}, list[Tensor]()
    for way, run in list(ways.items()):
        begin = time.perf_counter()
        try:
            given = results(run, x, upper)
        except Exception as error:  # what the compiler refuses leaves the others their rows
            notes.append(f"{name}, {way}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            del ways[way]
            continue
        begun[way] = time.perf_counter() - begin
        wanted = wanted or given
        pairs = zip(given, wanted, strict=True)
        apart[way] = max(float((one - other).float().norm() / other.float().norm()) for one, other in pairs)
    for turn in range(asked.rounds + 3):
        for way, run in ways.items():
            models[way].zero_grad(set_to_none=True)
            x.grad = None
            taken = timed(run, upper)
            if turn >= 3:
                times[way].append(taken)
    middle = {way: statistics.median(times[way]) for way in ways}
    cells = []
    for way, run in ways.items():
        models[way].zero_grad(set_to_none=True)
        x.grad = None
        peak = peak_bytes(run, upper)
        cells.append(
            [
                *(name, way, f"{middle[way]:.3f}", f"{middle['unfused'] / middle[way]:.2f}"),
                "-" if peak is None else f"{peak / 2**20:,.0f}",
                str(breaks) if way == compiled else "",
                *(f"{begun[way]:.1f}", f"{apart[way]:.1e}"),
            ]
        )
    return cells, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a small layer of few tokens")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--backend", default="inductor")
    asked = parser.parse_args()
    tokens = 64 if asked.tiny else asked.tokens
    length = min(2048, tokens)
    width = (TINY if asked.tiny else SHAPE)["hidden_size"]
    rows, notes = [], []
    for name in LAYERS:
        dtype = DTYPE if name.startswith("QLoRA") else torch.float32  # QAT's residual stream is its weights'
        x = torch.randn(tokens // length, length, width, device=DEVICE, dtype=dtype, requires_grad=True)
        more, said = rows_of(name, asked, x, torch.randn_like(x))
        rows += more
        notes += said
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    shown = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in (HEAD, *rows)]
    lines = [shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:], ""]
    lines += [f"{tokens} tokens, {device_name()}, torch {torch.__version__}", *(f"- {note}" for note in notes)]
    print("\n".join(lines))
    if asked.out:
        free_name(asked.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
