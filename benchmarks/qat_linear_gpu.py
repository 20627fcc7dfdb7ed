"""A layer of QAT on a GPU: bf16, simulated, and as a product of int8 or fp8 codes; then its kernels one by one.

    python benchmarks/qat_linear_gpu.py [--out OUT.md] [--shapes 8192x4096x11008 8192x2048x8192] [--rounds 30] [--tiles]

Shapes are tokens x in x out. Layers train W in fp32 under bf16 autocast (the first row alone holds it in bf16); times
are medians, the layers taken in turn; memory is the peak of a forward and a backward above what lies there before,
the gradients of W and x among it. The last columns are of a layer of 16 x 64 tokens x numbers: what the host spends.
torchao's rows need torchao 0.18. --tiles times every tile of the product. Without a GPU all of it is fp32, and tiny
unless --shapes says otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn

from qtrain.kernels.codes import codes, plain_codes
from qtrain.kernels.fp8_product import Fp8Rows, fp8_matmul, plain_fp8_matmul
from qtrain.kernels.int8_matmul import int8_matmul, plain_int8_matmul
from qtrain.modules.config import QuantizerSection, WeightSection
from qtrain.modules.kernel_keys import Kernels
from qtrain.modules.quant_linear import QuantLinear
from qtrain.numerics.rules import Dynamic, Learned

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
PLAIN = f"plain, {str(DTYPE).removeprefix('torch.')} weights"
Shape = tuple[int, int, int]
Call = Callable[[], object]


def layers(width: int, out: int) -> dict[str, nn.Module]:
    """By the name of their row, over one weight."""
    torch.manual_seed(0)
    plain = nn.Linear(width, out, bias=False, device=DEVICE)
    tokens, lsq = QuantizerSection(format="int8"), {"range": "learned", "calibrate": "lsq"}
    int8, int4 = WeightSection(format="int8"), WeightSection(format="int4")
    groups = WeightSection(format="int4", group_size=32)
    fp8, fp8_tokens = WeightSection(format="fp8_e4m3"), QuantizerSection(format="fp8_e4m3")

    def made(
        weight: WeightSection, inputs: QuantizerSection | None, kernels: Kernels, byte_gradient: bool = False
    ) -> QuantLinear:
        layer = QuantLinear.from_linear(plain, weight, inputs).to(DEVICE)
        layer.kernels, layer.byte_gradient = kernels, byte_gradient
        return layer

    found: dict[str, nn.Module] = {
        PLAIN: nn.Linear(width, out, bias=False, device=DEVICE, dtype=DTYPE),
        "fp32 weights, autocast": plain,
        "W8A8 plain": made(int8, tokens, "plain"),
        "W8A8 one-pass": made(int8, tokens, "triton"),
        "W8A8 int8": made(int8, tokens, "int8"),
        "W8A8 int8, input gradient too": made(int8, tokens, "int8", True),
        "W4A8 learned, one-pass": made(int4.merged(lsq), tokens, "triton"),
        "W4A8 learned, int8": made(int4.merged(lsq), tokens, "int8"),
        "W4A8 learned, int8, input gradient too": made(int4.merged(lsq), tokens, "int8", True),
        "fp8 plain": made(fp8, fp8_tokens, "plain"),
        "fp8 one-pass": made(fp8, fp8_tokens, "triton"),
        "fp8 fp8": made(fp8, fp8_tokens, "fp8"),
        "W4 g32, plain": made(groups, None, "plain"),
        "W4 g32, one-pass": made(groups, None, "triton"),
        "W4 g32 A8, one-pass": made(groups, tokens, "triton"),
        "W4 g32 learned A8, one-pass": made(groups.merged(lsq), tokens, "triton"),
    }
    try:
        from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig
    except ImportError:
        return found
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)  # by token it has no other
    for name, weights in (
        ("torchao W8A8", IntxFakeQuantizeConfig(torch.int8, "per_channel")),
        ("torchao W4 g32 A8", IntxFakeQuantizeConfig(torch.int4, group_size=32)),
    ):
        found[name] = FakeQuantizedLinear.from_linear(plain, activation_config=inputs, weight_config=weights)
    return found


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def milliseconds(call: Call) -> float:
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return 1e3 * (time.perf_counter() - begin)


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Taken in turn, after three rounds that count for nothing."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 3):
        for name, call in calls.items():
            found = milliseconds(call)
            if number >= 3:
                times[name].append(found)
    return {name: statistics.median(found) for name, found in times.items()}


def of_layer(layer: nn.Module, inputs: Iterator[Tensor], upper: Tensor) -> tuple[Call, Call]:
    """(forward, forward and backward), each time of another input: of the same one the codes would be there."""

    def forward() -> Tensor:
        x = next(inputs)
        x.grad = None
        with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
            y: Tensor = layer(x)
        return y

    def both() -> None:
        layer.zero_grad()
        forward().backward(upper)

    return forward, both


def peak_mib(both: Call) -> float:
    if not ON_GPU:
        return float("nan")
    both()
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def host_microseconds(call: Call, calls: int = 200) -> float:
    """Of one call, the device being behind or idle: nothing is waited for in between."""
    for _ in range(20):
        call()
    found = []
    for _ in range(5):
        synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - begin) / calls)
        synchronize()
    return 1e6 * min(found)


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def two_inputs(tokens: int, width: int) -> Iterator[Tensor]:
    shape = (tokens, width)
    return cycle([torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(2)])


def layer_table(shape: Shape, rounds: int) -> str:
    tokens, width, out = shape
    x, small_x = two_inputs(tokens, width), two_inputs(16, 64)
    upper = torch.randn(tokens, out, device=DEVICE, dtype=DTYPE)
    small_upper = torch.randn(16, 64, device=DEVICE, dtype=DTYPE)
    made = layers(width, out)
    calls = {name: of_layer(layer, x, upper) for name, layer in made.items()}
    forward = medians({name: call[0] for name, call in calls.items()}, rounds)
    both = medians({name: call[1] for name, call in calls.items()}, rounds)
    memory = {name: peak_mib(call[1]) for name, call in calls.items()}
    host = {name: of_layer(layer, small_x, small_upper) for name, layer in layers(64, 64).items()}
    rows = [
        ["layer", "forward ms", "with backward ms", "of plain", "TFLOP/s", "peak MiB", "host us", "with backward us"]
    ]
    flops = 6e-9 * tokens * width * out
    for name in made:
        rows.append(
            [
                name,
                f"{forward[name]:.3f}",
                f"{both[name]:.3f}",
                f"{both[name] / both[PLAIN]:.2f}",
                f"{flops / both[name]:.0f}",
                f"{memory[name]:.0f}",
                f"{host_microseconds(host[name][0]):.0f}",
                f"{host_microseconds(host[name][1]):.0f}",
            ]
        )
    return f"## {tokens} x {width} x {out}\n\n{table(rows)}\n"


def kernel_table(shape: Shape, rounds: int, tiles: bool) -> str:
    tokens, width, out = shape
    by_token = Dynamic(QuantizerSection(format="int8").spec(weight=False))
    by_row = Learned(WeightSection(format="int4").spec(weight=True))
    x = torch.randn(tokens, width, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(out, width, device=DEVICE)
    scale = Dynamic(by_row.spec).qparams(weight, None, None).scale.float() * 0.7
    q_x, s_x = codes(x, by_token.key)
    q_w, s_w = codes(weight, by_row.key, scale)
    wide = weight.to(DTYPE)
    fp8_by_token = Dynamic(QuantizerSection(format="fp8_e4m3").spec(weight=False))
    fp8_by_row = Dynamic(WeightSection(format="fp8_e4m3").spec(weight=True))
    fp8_x, fp8_w = codes(x, fp8_by_token.key), codes(weight, fp8_by_row.key)
    fp8_sides = [Fp8Rows(q, s.unsqueeze(1)) for q, s in (fp8_x, fp8_w)]
    same = {
        "codes of inputs": _equal(codes(x, by_token.key), plain_codes(x, by_token)),
        "codes of weights": _equal(codes(weight, by_row.key, scale), plain_codes(weight, by_row, scale)),
        "fp8 codes of inputs": _equal(fp8_x, plain_codes(x, fp8_by_token)),
        "fp8 codes of weights": _equal(fp8_w, plain_codes(weight, fp8_by_row)),
    }
    ours = int8_matmul(q_x, q_w, s_x, s_w, None, torch.float32)
    twin = plain_int8_matmul(q_x, q_w, s_x, s_w, None, torch.float32)
    error = float((ours - twin).abs().max() / twin.abs().max())
    fp8_twin = plain_fp8_matmul(fp8_sides[0], fp8_sides[1], torch.float32)
    fp8_errors = [
        float((fp8_matmul(*fp8_sides, torch.float32, fast_sums=fast) - fp8_twin).norm() / fp8_twin.norm())
        for fast in (False, True)
    ]
    calls: dict[str, Call] = {
        "codes of inputs": lambda: codes(x, by_token.key),
        "codes of inputs, plain": lambda: plain_codes(x, by_token),
        "codes of weights": lambda: codes(weight, by_row.key, scale),
        "codes of weights, plain": lambda: plain_codes(weight, by_row, scale),
        "product of floats": lambda: x @ wide.t(),
        "product int8": lambda: int8_matmul(q_x, q_w, s_x, s_w, None, DTYPE),
        "product int8, plain": lambda: plain_int8_matmul(q_x, q_w, s_x, s_w, None, DTYPE),
        "codes of inputs, fp8": lambda: codes(x, fp8_by_token.key),
        "codes of inputs, fp8, plain": lambda: plain_codes(x, fp8_by_token),
        "codes of weights, fp8": lambda: codes(weight, fp8_by_row.key),
        "codes of weights, fp8, plain": lambda: plain_codes(weight, fp8_by_row),
        "product fp8": lambda: fp8_matmul(*fp8_sides, DTYPE, fast_sums=False),
        "product fp8, fast sums": lambda: fp8_matmul(*fp8_sides, DTYPE),
        "codes of weights, transposed": lambda: q_w.t().contiguous(),
    }
    if tiles and ON_GPU:
        from qtrain.kernels import int8_tiles

        for one in (*int8_tiles.CONFIGS[:2], *(int8_tiles.Tiles(*sizes) for sizes in CANDIDATES)):
            name = f"product int8, {one.m} x {one.n} x {one.k}, {one.num_warps} warps, {one.num_stages} stages"
            calls[name] = lambda one=one: int8_tiles.int8_matmul(  # type: ignore[misc]
                q_x, q_w, s_x, s_w, None, DTYPE, one
            )
    found = medians(calls, rounds)
    amounts = {"codes of inputs": 3e-6 * tokens * width, "codes of weights": 5e-6 * out * width}
    rows = [["kernel", "ms", "rate"]]
    for name, took in found.items():
        moved = next((amount for begin, amount in amounts.items() if name.startswith(begin)), None)
        rate = f"{moved / took:.0f} GB/s" if moved else f"{2e-9 * tokens * width * out / took:.0f} T(FL)OP/s"
        rows.append([name, f"{took:.3f}", "" if name.endswith("transposed") else rate])
    facts = ", ".join(f"{name} equal: {equal}" for name, equal in same.items())
    exact, fast = (f"{one:.1e}" for one in fp8_errors)
    facts += f"; largest difference of products {error:.1e}; of fp8 by norm {exact}, with fast sums {fast}"
    return f"{table(rows)}\n\n{facts}\n"


CANDIDATES = (
    (128, 256, 128, 8, 4),
    (256, 128, 128, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 128, 4, 4),
    (128, 128, 256, 8, 3),
)


def _equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(one[0].float(), other[0].float()) and torch.equal(one[1], other[1])


def _shape(text: str) -> Shape:
    tokens, width, out = map(int, text.split("x"))
    return tokens, width, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    default = ["8192x4096x11008", "8192x2048x8192"] if ON_GPU else ["64x128x256"]
    parser.add_argument("--shapes", type=_shape, nargs="+", default=list(map(_shape, default)))
    parser.add_argument("--rounds", type=int, default=30 if ON_GPU else 3)
    parser.add_argument("--tiles", action="store_true")
    asked = parser.parse_args()
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    text = f"# A layer of QAT on {device}, torch {torch.__version__}\n\n"
    for shape in asked.shapes:
        text += layer_table(shape, asked.rounds) + "\n" + kernel_table(shape, asked.rounds, asked.tiles) + "\n"
    print(text)
    if asked.out:
        asked.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
