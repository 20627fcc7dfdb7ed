"""A fake-quantized linear layer beside the plain one, and beside torchao's: time, and bytes kept for the backward.

    python benchmarks/fake_quant_linear.py [OUT.md]

fp32, 1024 inputs x 1024 outputs x 1024 rows, forward and backward, medians of 40, taken in turn. Saved bytes are those
that autograd holds beyond the layer's input and parameters, for each weight. torchao's row needs torchao 0.18.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from qtrain.modules.config import QuantizerSection, WeightSection
from qtrain.modules.quant_linear import QuantLinear

SIZE, ROUNDS = 1024, 40
Layer = Callable[[Tensor], Tensor]


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Linear(SIZE, SIZE, bias=False)
    int4 = WeightSection(format="int4", group_size=32)
    made: dict[str, nn.Module] = {
        "plain": plain,
        "qtrain int4 g32": QuantLinear.from_linear(plain, int4),
        "qtrain int4 g32, int8 inputs": QuantLinear.from_linear(plain, int4, QuantizerSection(format="int8")),
        "qtrain int4 g32 learned (LSQ)": QuantLinear.from_linear(plain, int4.merged({"range": "learned"})),
    }
    try:
        from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig
    except ImportError:
        return made
    config = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    made["torchao int4 g32, eager"] = FakeQuantizedLinear.from_linear(plain, weight_config=config)
    return made


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    held = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def main(out: str | None = None) -> None:
    x, upper = torch.randn(SIZE, SIZE, requires_grad=True), torch.randn(SIZE, SIZE)
    made = layers()
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(ROUNDS):
        for name, layer in made.items():
            begin = time.perf_counter()
            layer(x).backward(upper)
            times[name].append(time.perf_counter() - begin)
    plain = statistics.median(times["plain"])
    rows = ["| layer | forward + backward | of plain | saved bytes a weight |", "|---|---|---|---|"]
    for name, layer in made.items():
        median = statistics.median(times[name])
        saved = saved_bytes(layer, x) / SIZE**2
        rows.append(f"| {name} | {1e3 * median:.1f} ms | {median / plain:.2f} | {saved:.2f} |")
    rows.append(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads")
    print("\n".join(rows))
    if out:
        Path(out).write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:2])
