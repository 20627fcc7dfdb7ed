"""Int8 kernels of CPUs beside fp32: a linear layer in torch's oneDNN, torchao and onnxruntime, fp32 and bf16 too.

    python benchmarks/int8_cpu.py [OUT.md] [THREADS]

Weights int8 by row, inputs int8 by token, quantized in the time that is taken; medians of all kernels in turn, so that
weights come from memory. One thread is measured by the time that it had on a core, whoever else is there; more by the
clock, on an idle machine. The error is the largest difference from the sum of the trained codes, of the largest output.
Rows of other packages need torchao 0.18, onnx and onnxruntime 1.31.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.modules.config import QuantizerSection, WeightSection
from qtrain.modules.int8_linear import Int8Linear
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.record import LinearRecord

SHAPES = [(rows, *layer) for layer in ((576, 1536), (2048, 8192)) for rows in (1, 16, 512)]
INPUTS = QuantizerSection(format="int8", convention="compressed-tensors")
Layer = Callable[[], Tensor]


def of_torchao(x: Tensor, record: LinearRecord) -> dict[str, Layer]:
    try:
        from torchao.quantization import MappingType
        from torchao.quantization.granularity import PerRow
        from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor, QuantizeTensorToInt8Kwargs
    except ImportError:
        return {}
    scale = record.scale.float()
    options = QuantizeTensorToInt8Kwargs(PerRow(), MappingType.SYMMETRIC, reduce_range=False)
    points = torch.zeros_like(scale, dtype=torch.int8)
    block = [1, x.shape[1]]
    weight = Int8Tensor(record.codes, scale, block, torch.float32, zero_point=points, act_quant_kwargs=options)
    return {"torchao Int8Tensor, eager": lambda: F.linear(x, weight)}


def of_onnxruntime(x: Tensor, record: LinearRecord, threads: int) -> dict[str, Layer]:
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return {}
    columns, out = x.shape[1], record.codes.shape[0]
    codes, scale = record.codes, record.scale.float()
    blocks = (codes.to(torch.int16) + 128).to(torch.uint8).reshape(out, -1, 32)
    held: dict[str, Tensor] = {
        "w": (codes.float() * scale).t(),
        "q": codes.t(),
        "s": scale.flatten(),
        "reach": torch.tensor(127.5),
        "axis": torch.tensor([-1]),
        "low": torch.tensor(-128.0),
        "high": torch.tensor(127.0),
        "half": torch.tensor(128.0),
        "middle": torch.tensor(128, dtype=torch.uint8),
        "blocks": blocks,
        "block_scales": scale.expand(out, columns // 32).flatten(),
        "zero": torch.tensor(0, dtype=torch.int8),
    }
    node = helper.make_node
    inputs_by_token = [
        node("Abs", ["x"], ["size"]),
        node("ReduceMax", ["size", "axis"], ["largest"], keepdims=1),
        node("Div", ["largest", "reach"], ["step"]),
        node("Div", ["x", "step"], ["scaled"]),
        node("Round", ["scaled"], ["whole"]),
        node("Clip", ["whole", "low", "high"], ["clipped"]),
        node("Add", ["clipped", "half"], ["positive"]),
        node("Cast", ["positive"], ["code"], to=TensorProto.UINT8),
        node("MatMulInteger", ["code", "q", "middle"], ["sum"]),
        node("Cast", ["sum"], ["number"], to=TensorProto.FLOAT),
        node("Mul", ["number", "step"], ["rows"]),
        node("Mul", ["rows", "s"], ["y"]),
    ]
    microsoft: dict[str, Any] = {"domain": "com.microsoft"}
    bits = {"K": columns, "N": out, "bits": 8, "block_size": 32, **microsoft}
    graphs = {
        "onnxruntime fp32": [node("MatMul", ["x", "w"], ["y"])],
        "onnxruntime MatMulInteger, by token": inputs_by_token,
        "onnxruntime DynamicQuantizeMatMul, one range": [
            node("DynamicQuantizeMatMul", ["x", "q", "s", "zero"], ["y"], **microsoft)
        ],
        "onnxruntime MatMulNBits, by block of 32": [
            node("MatMulNBits", ["x", "blocks", "block_scales"], ["y"], accuracy_level=4, **bits)
        ],
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    feed = {"x": x.numpy()}
    made: dict[str, Layer] = {}
    for name, nodes in graphs.items():
        used = {item for step in nodes for item in step.input} & held.keys()
        graph = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, out])],
            [numpy_helper.from_array(held[item].contiguous().numpy(), item) for item in used],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        made[name] = lambda session=session: torch.from_numpy(session.run(None, feed)[0])
    return made


def layers(x: Tensor, out: int, threads: int) -> tuple[dict[str, Layer], Tensor]:
    """The ways to multiply, and what the trained codes sum to."""
    linear = nn.Linear(x.shape[1], out, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    trained = QuantLinear.from_linear(linear, WeightSection(format="int8"), INPUTS)
    codes, qparams = trained.codes()
    assert trained.weight_quantizer is not None and trained.input_quantizer is not None
    record = LinearRecord(codes, qparams.scale, None, trained.weight_quantizer.spec)
    simulated = PackedLinear.from_record(record, None, INPUTS)
    integers = Int8Linear(simulated)
    quantizer, sums = trained.input_quantizer, 128 * codes.sum(1, dtype=torch.int32)

    def by_int_mm() -> Tensor:
        q, inputs = quantizer.codes(x)
        product = torch._int_mm(q.view(torch.uint8) ^ 128, codes.t()).sub_(sums)
        return product.float().mul_(inputs.scale).mul_(record.scale.flatten())

    half_x, half_w = x.bfloat16(), linear.weight.bfloat16()
    made: dict[str, Layer] = {
        "torch fp32": lambda: linear(x),
        "torch bf16": lambda: F.linear(half_x, half_w),
        "fake quantization in fp32": lambda: trained(x),
        "qtrain Int8Linear (oneDNN)": lambda: integers(x),
        "torch._int_mm (oneDNN)": by_int_mm,
        **of_torchao(x, record),
        **of_onnxruntime(x, record, threads),
    }
    levels = trained.input_quantizer(x).double()
    return made, levels @ (codes.double() * qparams.scale.double()).t()


def main(out: str | None = None, threads: str = "2") -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    times: dict[str, list[str]] = {}
    errors: dict[str, float] = {}
    for rows, columns, outputs in SHAPES:
        made, expected = layers(torch.randn(rows, columns), outputs, int(threads))
        taken: dict[str, list[float]] = {name: [] for name in made}
        for name, layer in made.items():
            difference = (layer().double() - expected).abs().max() / expected.abs().max()
            errors[name] = max(errors.get(name, 0.0), float(difference))
        clock = time.thread_time if threads == "1" else time.perf_counter
        for _ in range(11 if rows * columns * outputs > 1e9 else 101):
            for name, layer in made.items():
                begin = clock()
                layer()
                taken[name].append(clock() - begin)
        plain = statistics.median(taken["torch fp32"])
        for name, seconds in taken.items():
            median = statistics.median(seconds)
            times.setdefault(name, []).append(f"{1e3 * median:.2f} ({plain / median:.1f})")
        print(rows, columns, outputs, {name: found[-1] for name, found in times.items()}, flush=True)
    heads = [f"{rows} x {columns} x {outputs}" for rows, columns, outputs in SHAPES]
    lines = ["| ms (times as fast as torch fp32) | " + " | ".join([*heads, "error"]) + " |", "|---" * 8 + "|"]
    lines += [f"| {name} | {' | '.join(found)} | {errors[name]:.0e} |" for name, found in times.items()]
    lines.append(f"\n{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    lines[-1] += f", {threads} thread(s)"
    print("\n".join(lines))
    if out:
        Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
