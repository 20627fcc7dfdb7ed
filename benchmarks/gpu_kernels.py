"""Exports of qtrain through integer kernels of a GPU: whether their numbers are ours, and how fast they are.

    python benchmarks/gpu_kernels.py WORK OUT.md [EXPORT ...] [--limit 150] [--compile-limit 300] [--deadline 540]

WORK gets exports of a random Llama in every format (four layers of 1024 x 3072 for the numbers, one of 4096 x 14336 for
the times); EXPORT are other directories that qtrain wrote. Kernels: tinygemm (in torch) and torchao's tensor over it,
torch._int_mm with the scales after it, humming, gptqmodel's Marlin and Triton (`pip install humming-kernels torchao
gptqmodel`). Each runs in processes of its own, under a time limit: one that is absent, refuses or dies is a row that
says so. Errors are |y - r| / max |r| of 64 rows and of 1 row, the largest of all linears, r in fp32 from the codes and
scales of the directory; KL in nats a token, and greedy tokens equal from the start on, against the same model in fp32;
"torch" columns are torch's own product in the kernel's dtype with the dequantized weight. Times are medians of one
linear, the L2 cache emptied before each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.export.awq.layer import awq_tensors
from qtrain.export.gptq.layer import gptq_tensors
from qtrain.models.packed import load_packed
from qtrain.models.quantized.checkpoint import load_skeleton, read_quantized
from qtrain.models.quantized.header import read_header
from qtrain.models.quantized.layer import QuantizedLayer
from qtrain.models.quantized.tensors import TensorFiles
from qtrain.modules.deployed import DeployedModel, DeployedTensor
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec
from qtrain.registry import resolve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, NEW_TOKENS, TIMED_ROWS = 64, 32, (1, 16, 2048)
Row = dict[str, Any]


# ---------------------------------------------------------------- the exports


def groups(format: str, size: int, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(format, symmetric, "per_group", size, full_range=symmetric, scale_dtype="bf16")


BYTES = QuantSpec("int8", granularity="per_channel", group_size=None, scale_dtype="bf16")
TOKENS = QuantSpec("int8", True, "per_token", None, convention="compressed-tensors", scale_dtype="fp32")
CT, GPTQ, AWQ, AO = (
    f"qtrain.export.{name}"
    for name in (
        "compressed_tensors.config:CompressedTensorsOptions",
        "gptq.config:GptqOptions",
        "awq.config:AwqOptions",
        "torchao.config:TorchaoOptions",
    )
)
EXPORTS: dict[str, tuple[str, QuantSpec, QuantSpec | None]] = {
    "ct-w4-g128": (CT, groups("int4", 128), None),
    "ct-w4-g64": (CT, groups("int4", 64), None),
    "ct-w4-g128-asym": (CT, groups("int4", 128, False), None),
    "ct-w3-g128": (CT, groups("int3", 128), None),
    "ct-w8a8": (CT, BYTES, TOKENS),
    "ct-w4a8-g128": (CT, groups("int4", 128), TOKENS),
    "gptq-w4-g128": (GPTQ, groups("int4", 128), None),
    "gptq-w4-g64-asym-v2": (GPTQ, groups("int4", 64, False), None),
    "gptq-w8-g128": (GPTQ, groups("int8", 128), None),
    "awq-w4-g128": (AWQ, groups("int4", 128, False), None),
    "torchao-w4-g128": (AO, groups("int4", 128), None),
}
WIDE = ("ct-w4-g128", "gptq-w4-g128", "awq-w4-g128", "ct-w8a8")
SHAPES = {"deep": (1024, 3072, 4, 16), "wide": (4096, 14336, 1, 32)}
TINY = {"deep": (256, 512, 2, 4), "wide": (256, 1024, 1, 4)}


def make(work: Path, tiny: bool) -> None:
    """Every export, as a QAT run with these codes would write it."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"<{number}>": number for number in range(4096)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")))
    for shape, (hidden, intermediate, depth, heads) in (TINY if tiny else SHAPES).items():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=4096,
            max_position_embeddings=2048,
            initializer_range=hidden**-0.5,
        )
        model = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16).eval()
        for name in WIDE if shape == "wide" else EXPORTS:
            options, weight, inputs = EXPORTS[name]
            built = resolve(options)()
            write = resolve(built.implementation)
            write(deployed(model, weight, inputs), built, work / f"{shape}-{name}", tokenizer=tokenizer, facts={})


def deployed(model: Any, weight: QuantSpec, inputs: QuantSpec | None) -> DeployedModel:
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}

    def record(value: Tensor) -> LinearRecord:
        qparams = choose_qparams(value, weight)
        codes = quantize(value, qparams, weight)
        points = None if qparams.zero_point is None else qparams.zero_point.cpu()
        return LinearRecord(codes.cpu(), qparams.scale.cpu(), points, weight)

    def tensors() -> Iterator[DeployedTensor]:
        for name, value in model.state_dict().items():
            shape = tuple(value.shape)
            if name not in linears:
                yield DeployedTensor(name, shape, False, value.cpu)
                continue
            yield DeployedTensor(name, shape, True, value.cpu, weight, lambda value=value: record(value), inputs)

    return DeployedModel(model.config, model.generation_config, tensors, torch.bfloat16, trained_codes=True)


class Case:
    """One directory, and what its codes say in fp32."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checkpoint = read_quantized(directory)
        self.tensors = TensorFiles(directory)
        self.header = read_header(directory) or {}
        self.method = self.checkpoint.method

    @property
    def layers(self) -> Mapping[str, QuantizedLayer]:
        return self.checkpoint.layers

    @property
    def spec(self) -> QuantSpec:
        return next(iter(self.layers.values())).spec

    @property
    def inputs(self) -> QuantSpec | None:
        scheme = next(iter(self.layers.values())).inputs
        return None if scheme is None else scheme.spec

    def raw(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of one linear."""
        return {
            key.removeprefix(f"{name}."): self.tensors.get(key) for key in self.tensors if key.startswith(f"{name}.")
        }

    def plain(self, dtype: torch.dtype) -> Any:
        """The model with torch's own products: dequantized weights, and inputs on their levels where it has such."""
        model: Any = load_packed(self.directory, dtype, device=DEVICE)
        for name in self.layers:
            model.set_submodule(name, Plain(model.get_submodule(name), dtype))
        return model

    @cached_property
    def reference(self) -> Any:
        return self.plain(torch.float32)

    @cached_property
    def ids(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(5, self.checkpoint.config.vocab_size, (1, ROWS), generator=generator).to(DEVICE)


class Plain(nn.Module):
    def __init__(self, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = packed.record().dequantize(dtype), packed.bias
        self.quantizer = packed.input_quantizer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x if self.quantizer is None else self.quantizer(x), self.weight, self.bias)


# ---------------------------------------------------------------- the kernels


class Refused(Exception):
    """The kernel has no place for this export, and why."""


class Kernel:
    """One way to multiply; the model around it is transformers' own unless ``model`` is another's.

    Attributes:
        title: in the table.
        packages: it needs.
        dtype: it computes in.
        alone: an export a process: it compiles, and the processes do so side by side.
        marlin: it waits for gptqmodel's Marlin to be compiled.
    """

    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    dtype: ClassVar[torch.dtype] = torch.float16
    alone: ClassVar[bool] = False
    marlin: ClassVar[bool] = False

    def layer(self, case: Case, name: str, bias: Tensor | None) -> nn.Module:
        """One layer of an export in this kernel; a consumer that loads whole directories has none.

        Raises:
            Refused: it has no place for this layer.
        """
        raise Refused(f"{self.title} loads whole directories, no single layers")

    def model(self, case: Case) -> Any:
        model = load_skeleton(case.checkpoint, self.dtype, DEVICE)
        for name in case.layers:
            model.set_submodule(name, self.layer(case, name, model.get_submodule(name).bias))
        return model

    def timed(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """As it would be deployed."""
        return layer


class Product(nn.Module):
    """y = product(x) + b."""

    def __init__(self, product: Callable[[Tensor], Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.product, self.bias = product, bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def weight_only(case: Case, bits: tuple[int, ...], sizes: tuple[int | None, ...]) -> None:
    if case.inputs is not None:
        raise Refused("it multiplies 16-bit inputs, and this export quantizes them")
    if case.spec.bits not in bits:
        raise Refused(f"{case.spec.bits} bits; it has {', '.join(map(str, bits))}")
    if case.spec.group_size not in sizes:
        raise Refused(
            f"groups of {case.spec.group_size or 'a row'}; it has {', '.join(str(s or 'a row') for s in sizes)}"
        )


class TinyGemm(Kernel):
    """w = (u - 8) s + z in bf16: codes as they are, z = -(zero point) s is rounded to bf16 where there is one."""

    title = "tinygemm (torch)"
    dtype = torch.bfloat16

    def layer(self, case: Case, name: str, bias: Tensor | None) -> nn.Module:
        weight_only(case, (4,), (32, 64, 128, 256))
        packed, ranges, size = self.packed(case.layers[name].load())
        return Product(lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, size, ranges), bias)

    def packed(self, record: LinearRecord) -> tuple[Tensor, Tensor, int]:
        codes = (record.codes.to(DEVICE).to(torch.int16) + 8).to(torch.uint8)
        scale = record.scale.to(DEVICE, torch.float32)
        zero = torch.zeros_like(scale) if record.zero_point is None else -record.zero_point.to(DEVICE).float() * scale
        tiles = next((tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0), None)
        if tiles is None or codes.shape[0] % 8:
            raise Refused(f"a weight {list(codes.shape)}: it has multiples of 8 x 32")
        packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), tiles)
        ranges = torch.stack([scale, zero], dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()
        return packed, ranges, codes.shape[1] // scale.shape[1]


class TorchAo(TinyGemm):
    """torchao's tensor for the same kernel, as ``Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d")`` has
    it, around the codes of the export: inputs padded to a multiple of 1024.
    """

    title = "torchao Int4TilePackedTo4dTensor"
    packages = ("torchao",)

    def layer(self, case: Case, name: str, bias: Tensor | None) -> nn.Module:
        from torchao.quantization import Int4TilePackedTo4dTensor

        weight_only(case, (4,), (32, 64, 128, 256))
        record = case.layers[name].load()
        (rows, columns), size = record.codes.shape, record.codes.shape[1] // record.scale.shape[1]
        wide = -columns % 1024
        if rows % 8 or wide % size:
            raise Refused(f"a weight {[rows, columns]} in groups of {size}: padded to 1024 inputs, and rows by 8")
        points = record.zero_point
        whole = LinearRecord(
            F.pad(record.codes, (0, wide)),
            F.pad(record.scale.float(), (0, wide // size), value=1.0),
            None if points is None else F.pad(points, (0, wide // size)),
            record.spec,
        )
        packed, ranges, _ = self.packed(whole)
        weight = Int4TilePackedTo4dTensor(packed, ranges, [1, size], torch.Size([rows, columns]))
        return Product(lambda x: F.linear(x, weight), bias)


class IntMm(Kernel):
    """int8 x int8 in whole numbers, then x's scale by row and w's by column: what W8A8 is."""

    title = "torch._int_mm"

    def layer(self, case: Case, name: str, bias: Tensor | None) -> nn.Module:
        spec, inputs = case.spec, case.inputs
        if inputs is None or inputs.bits != 8 or inputs.granularity != "per_token" or not inputs.symmetric:
            raise Refused("it multiplies int8 by int8, and this export does not quantize its inputs so")
        if spec.group_size is not None or not spec.symmetric:
            raise Refused(f"groups of {spec.group_size}: one sum over all of K has no place for their scales")
        record = case.layers[name].load()
        codes, scale = record.codes.to(DEVICE).t(), record.scale.to(DEVICE, torch.float32).view(1, -1)
        reach, low, high = inputs.reach, inputs.quant_min, inputs.quant_max

        def product(x: Tensor) -> Tensor:
            numbers = x.float()
            step = numbers.abs().amax(dim=1, keepdim=True).div(reach).clamp(min=1e-12)
            q = (numbers / step).round_().clamp_(low, high).to(torch.int8)
            more = max(0, 17 - len(q))  # it takes no fewer than 17 rows
            y = torch._int_mm(F.pad(q, (0, 0, 0, more)), codes)[: len(q)]
            return (y.float() * step * scale).to(x.dtype)

        return Product(product, bias)

    def timed(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return torch.compile(layer, dynamic=False)


class Humming(Kernel):
    """humming-kernels reads the directory itself, and compiles a kernel for each shape (NVRTC)."""

    title = "humming"
    packages = ("humming",)
    alone = True

    def layer(self, case: Case, name: str, bias: Tensor | None) -> nn.Module:
        from humming.layer import HummingLayer

        if case.method == "torchao":
            raise Refused("it reads no torchao directories")
        if case.inputs is not None:
            layer = self._with_inputs(case, name)
        else:
            layer = HummingLayer.from_safetensors(str(case.directory), prefix=f"{name}.", torch_dtype=self.dtype)
        layer.to(DEVICE)
        layer.transform()
        return Product(layer, None)

    def _with_inputs(self, case: Case, name: str) -> Any:
        """int8 inputs: its own reader (0.1.19) takes no ``group_size: null``, which compressed-tensors writes for them,
        and asserts 8 bits for int-quantized, where W4A8 has int4 codes in the same bytes.
        """
        from humming.layer import HummingLayer

        group = case.header["config_groups"]["group_0"]
        shared = {"quant_method": "compressed-tensors", "format": "int-quantized"}
        rows, columns = case.layers[name].load().codes.shape
        layer = HummingLayer(
            shape_n=rows,
            shape_k=columns,
            weight_config={**group["weights"], **shared, "num_bits": 8},
            input_config={**group["input_activations"], **shared, "group_size": 0},
            torch_dtype=self.dtype,
        )
        layer.load_from_tensors(case.raw(name))
        return layer


class Marlin(Kernel):
    """gptqmodel's Marlin: the words of a GPTQ or AWQ directory as they are; of others, repacked as vLLM does."""

    title = "Marlin (gptqmodel)"
    packages = ("gptqmodel",)
    marlin = True

    def layer(self, case: Case, name: str, bias: Tensor | None) -> nn.Module:
        split_marlin()
        from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear
        from gptqmodel.nn_modules.qlinear.marlin_awq import AwqMarlinLinear

        symmetric = case.spec.symmetric
        weight_only(case, (4, 8) if symmetric else (4,), (None, 32, 64, 128))
        record = case.layers[name].load()
        if symmetric:
            kind: Any = MarlinLinear
            words = case.raw(name) if case.method == "gptq" else gptq_tensors(name, record, 1)
        else:
            kind = AwqMarlinLinear
            words = case.raw(name) if case.method == "awq" else awq_tensors(name, record)
        return gptqmodel_layer(kind, record, words, bias, self.dtype)


class GptqTriton(Kernel):
    """gptqmodel's Triton kernel: dequantizes, then torch's product."""

    title = "Triton (gptqmodel)"
    packages = ("gptqmodel",)

    def layer(self, case: Case, name: str, bias: Tensor | None) -> nn.Module:
        from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear

        weight_only(case, (2, 4, 8), (None, 16, 32, 64, 128, 256, 512, 1024))
        record = case.layers[name].load()
        return gptqmodel_layer(TritonV2Linear, record, gptq_tensors(name, record, 2), bias, self.dtype)


class GptqModelLoad(Kernel):
    """``GPTQModel.load(DIRECTORY)`` with its Marlin: everything is read by the consumer."""

    title = "GPTQModel.load, Marlin"
    packages = ("gptqmodel",)
    marlin = True

    def model(self, case: Case) -> Any:
        split_marlin()
        from gptqmodel import BACKEND, GPTQModel

        if case.method not in ("gptq", "awq"):
            raise Refused(f"it reads no {case.method} directories")
        if case.method == "gptq" and not case.spec.symmetric:
            raise Refused("its Marlin for GPTQ is symmetric")
        backend = BACKEND.GPTQ_MARLIN if case.method == "gptq" else BACKEND.AWQ_MARLIN
        return GPTQModel.load(str(case.directory), backend=backend, device=f"{DEVICE}:0", dtype=self.dtype).model


def gptqmodel_layer(kind: Any, record: LinearRecord, words: dict[str, Tensor], bias: Tensor | None, dtype: Any) -> Any:
    rows, columns = record.codes.shape
    layer = kind(
        bits=record.spec.bits,
        group_size=record.spec.group_size or -1,
        desc_act=False,
        sym=record.spec.symmetric,
        in_features=columns,
        out_features=rows,
        bias=bias is not None,
        pack_dtype=torch.int32,
        register_buffers=True,
        dtype=dtype,
    )
    given = {**layer._parameters, **layer._buffers}
    for part, value in {**words, **({} if bias is None else {"bias": bias})}.items():
        if given.get(part) is not None and given[part].shape == value.shape:
            given[part].data = value.to(given[part].dtype).contiguous()
        elif part in ("qweight", "scales", "qzeros"):
            raise Refused(f"{part} of shape {list(value.shape)}, it expects {getattr(given.get(part), 'shape', None)}")
    layer = layer.to(DEVICE).eval()
    layer.post_init()
    return layer


KERNELS: dict[str, type[Kernel]] = {
    "tinygemm": TinyGemm,
    "torchao": TorchAo,
    "int_mm": IntMm,
    "humming": Humming,
    "triton": GptqTriton,
    "marlin": Marlin,
    "gptqmodel": GptqModelLoad,
}
INSTANTIATIONS = 6


def split_marlin() -> ModuleType:
    """The same instantiations of Marlin in more files: five files of up to 150 keep most cores waiting."""
    from gptqmodel.utils import marlin

    whole = getattr(marlin, "_whole_sources", None) or marlin._marlin_sources
    marlin._whole_sources = whole

    def sources(dtype: str) -> list[str]:
        found = []
        for path in map(Path, whole(dtype)):
            lines = path.read_text().splitlines()
            instances = [line for line in lines if line.startswith("template __global__")]
            if not instances:
                found.append(str(path))
                continue
            head = [line for line in lines if line.startswith(("#include", "namespace"))]
            for start in range(0, len(instances), INSTANTIATIONS):
                part = path.with_name(f"part_{path.stem}_{start}.cu")
                text = "\n".join([*head, *instances[start : start + INSTANTIATIONS], "}", ""])
                if not part.exists() or part.read_text() != text:
                    part.write_text(text)
                found.append(str(part))
        return found

    marlin._marlin_sources = sources
    return marlin


# ---------------------------------------------------------------- one kernel over some exports


def check(kernel: Kernel, case: Case) -> Row:
    """Numbers of all linears, and of the model."""
    begin = time.monotonic()
    model = kernel.model(case)
    reference, plain = case.reference, case.plain(kernel.dtype)
    generator = torch.Generator(DEVICE).manual_seed(0)
    worst = {"error": 0.0, "error_torch": 0.0}
    for name in case.layers:
        exact, own, torchs = (m.get_submodule(name) for m in (reference, model, plain))
        for rows in (ROWS, 1):
            x = torch.randn(rows, exact.weight.shape[1], device=DEVICE, generator=generator).to(kernel.dtype)
            r = exact(x.float())
            for key, layer in (("error", own), ("error_torch", torchs)):
                y = layer(x).float()
                if not bool(y.isfinite().all()):
                    raise FloatingPointError(f"{name}: NaN or inf")
                worst[key] = max(worst[key], float((y - r).abs().max() / r.abs().max()))
    target = reference(case.ids).logits.double().log_softmax(-1)
    found: Row = {**worst, "linears": len(case.layers)}
    best = greedy(reference, case.ids)
    for key, one in (("", model), ("_torch", plain)):
        logits = one(case.ids).logits.double().log_softmax(-1)
        found[f"kl{key}"] = float((target.exp() * (target - logits)).sum(-1).mean())
        found[f"top1{key}"] = float((logits.argmax(-1) == target.argmax(-1)).double().mean())
        same = (greedy(one, case.ids) == best).long()
        found[f"greedy{key}"] = int(same.cumprod(0).sum())
    return found | {"seconds": round(time.monotonic() - begin, 1)}


def greedy(model: Any, ids: Tensor) -> Tensor:
    """New tokens, one row at a time through the linears."""
    found, cache, step = [], None, ids
    for _ in range(NEW_TOKENS):
        out = model(step, past_key_values=cache, use_cache=True)
        step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        found.append(step[0, 0])
    return torch.stack(found)


def times(kernel: Kernel, case: Case) -> Row:
    """Microseconds of the largest linear."""
    from triton.testing import do_bench

    sizes = {name: layer.load().codes.shape for name, layer in case.layers.items()}
    name = max(sizes, key=lambda key: sizes[key].numel())
    layer = kernel.timed(kernel.layer(case, name, None))
    plain = case.layers[name].load().dequantize(kernel.dtype).to(DEVICE)
    found: Row = {"shape": list(plain.shape)}
    for rows in TIMED_ROWS:
        x = torch.randn(rows, plain.shape[1], device=DEVICE, dtype=kernel.dtype)
        found[f"us_{rows}"] = 1e3 * do_bench(lambda x=x: layer(x), return_mode="median")
        found[f"us_{rows}_torch"] = 1e3 * do_bench(lambda x=x: F.linear(x, plain), return_mode="median")
    return found


def work_on(kernel: Kernel, directories: list[Path], timed: bool) -> None:
    """A line of JSON an export on stdout; ends early where CUDA itself has failed, for nothing runs after that."""
    for directory in directories:
        row: Row = {"export": str(directory)}
        over = False
        try:
            with torch.no_grad():
                row |= {"status": "ran", **(times if timed else check)(kernel, Case(directory))}
        except Refused as reason:
            row |= {"status": "refused", "reason": str(reason)}
        except Exception as error:  # a foreign kernel may raise anything; the row says what
            text = " ".join(str(error).split())
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {text[:300]}"}
            over = "CUDA error" in text or "AcceleratorError" in row["reason"]
        print("ROW " + json.dumps(row), flush=True)
        if over:
            os._exit(3)


# ---------------------------------------------------------------- all of them


@dataclass
class Run:
    limit: float
    end: float
    log: Path

    def left(self, limit: float) -> float:
        return min(limit, self.end - time.monotonic())

    def process(self, arguments: list[str], limit: float, name: str) -> tuple[str, str]:
        """stdout of this script with other arguments, and why it ended ("" where it ended well)."""
        allowed = self.left(limit)
        if allowed < 5:
            return "", "not reached: the time for all of it was over"
        environment = {**os.environ, "MAX_JOBS": os.environ.get("MAX_JOBS", "16"), "PYTHONUNBUFFERED": "1"}
        out, err = self.log / f"{name}.out", self.log / f"{name}.err"
        with out.open("w") as stdout, err.open("w") as stderr:
            command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), *arguments]
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, start_new_session=True)
            try:
                code = process.wait(timeout=allowed)
                why = "" if code == 0 else f"exit {code}: {last_line(err)}"
            except subprocess.TimeoutExpired:
                why = f"stopped after {allowed:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return out.read_text(errors="replace"), why

    def rows(self, key: str, directories: list[Path], timed: bool) -> list[Row]:
        """Of one kernel; a process that dies is started again with what it has not done."""
        found: list[Row] = []
        left = list(directories)
        while left:
            name = f"{key}-{'time' if timed else 'check'}-{left[0].name}"
            arguments = ["--worker", key, *(["--timed"] if timed else []), *map(str, left)]
            text, why = self.process(arguments, self.limit, name)
            rows = [json.loads(line[4:]) for line in text.splitlines() if line.startswith("ROW ")]
            done = {row["export"] for row in rows}
            left = [directory for directory in left if str(directory) not in done]
            if left and not (rows and why.startswith("exit 3")):
                dead = left if why.startswith(("stopped", "not reached")) else left[:1]
                rows += [{"export": str(one), "status": "failed", "reason": why or "no answer"} for one in dead]
                left = [directory for directory in left if directory not in dead]
            found += [{"kernel": key, **row} for row in rows]
        return found


def last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def absent(kernel: type[Kernel]) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    missing = [name for name in kernel.packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def run_all(work: Path, target: Path, exports: list[Path], arguments: argparse.Namespace) -> None:
    log = work / "log"
    log.mkdir(parents=True, exist_ok=True)
    run = Run(arguments.limit, time.monotonic() + arguments.deadline, log)
    shutil.rmtree(work / "exports", ignore_errors=True)
    _, why = run.process(
        ["--make", str(work / "exports"), *(["--tiny"] if arguments.tiny else [])], arguments.limit, "make"
    )
    if why:
        print(f"making the exports: {why}", file=sys.stderr)
    made = sorted((work / "exports").glob("*/config.json"))
    directories = [path.parent for path in made] + exports
    wide = [path.parent for path in made if path.parent.name.startswith("wide-")]
    chosen = {key: KERNELS[key] for key in arguments.kernels}
    missing = {key: reason for key, kernel in chosen.items() if (reason := absent(kernel))}
    present = {key: kernel for key, kernel in chosen.items() if key not in missing}
    rows: list[Row] = [{"kernel": key, "export": "", "status": "absent", "reason": why} for key, why in missing.items()]
    timed: list[Row] = []
    notes = [f"{len(directories)} exports made or given after {arguments.deadline - run.left(1e9):.0f} s"]
    if why:
        notes.append(f"making the exports: {why}")
    with ThreadPoolExecutor(8) as pool:
        compiled: Future[tuple[str, str]] | None = None
        begin = time.monotonic()
        if any(kernel.marlin for kernel in present.values()):
            compiled = pool.submit(run.process, ["--compile"], arguments.compile_limit, "compile")
        pending: list[Future[list[Row]]] = []
        for key, kernel in present.items():
            if kernel.marlin:
                continue
            units = [[directory] for directory in directories] if kernel.alone else [directories]
            pending += [pool.submit(run.rows, key, unit, False) for unit in units]
        for future in pending:
            rows += future.result()
            write_table(target, rows, timed, notes, log)
        if pending:
            notes.append(f"checks of other kernels: {time.monotonic() - begin:.0f} s, Marlin's compile beside them")
        if compiled is not None:
            _, why = compiled.result()
            reason = f"its compile: {why}" if why else None
            notes.append(
                reason or f"Marlin (fp16) compiled {time.monotonic() - begin:.0f} s after the start of the checks"
            )
            for key in [key for key, kernel in present.items() if kernel.marlin]:
                if reason:
                    rows.append({"kernel": key, "export": "", "status": "failed", "reason": reason})
                    del present[key]
                else:
                    rows += run.rows(key, directories, False)
        write_table(target, rows, timed, notes, log)
    ran = {(row["kernel"], row["export"]) for row in rows if row["status"] == "ran"}
    for key in present:  # one after the other, nothing beside them
        able = [directory for directory in wide if (key, str(directory)) in ran and key != "gptqmodel"]
        if able:
            timed += run.rows(key, able, True)
            write_table(target, rows, timed, notes, log)
    write_table(target, rows, timed, notes, log)
    print(target.read_text(encoding="utf-8"))


def write_table(target: Path, rows: list[Row], timed: list[Row], notes: list[str], log: Path) -> None:
    order = list(KERNELS)
    rows = sorted(rows, key=lambda row: (order.index(row["kernel"]), row["export"]))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = [
        "# Exports through integer kernels of a GPU",
        "",
        f"`python benchmarks/gpu_kernels.py`, {device}, torch {torch.__version__}, {versions()}.",
        "",
        "| kernel | export | dtype | | largest error | torch | KL | torch | top-1 | greedy | torch |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kernel = KERNELS[row["kernel"]]
        cells = [kernel.title, Path(row["export"]).name or "all", str(kernel.dtype).removeprefix("torch.")]
        if row["status"] == "ran":
            cells += [f"ran, {row['linears']} linears", f"{row['error']:.1e}", f"{row['error_torch']:.1e}"]
            cells += [f"{row['kl']:.1e}", f"{row['kl_torch']:.1e}", f"{row['top1']:.1%}"]
            cells += [f"{row['greedy']} of {NEW_TOKENS}", f"{row['greedy_torch']} of {NEW_TOKENS}"]
        else:
            reason = re.sub(r"[|`]", " ", row["reason"])
            cells += [f"{row['status']}: {reason}", *[""] * 7]
        lines.append("| " + " | ".join(cells) + " |")
    heads = [f"{rows} {what}" for rows in TIMED_ROWS for what in ("rows", "torch", "times")]
    lines += ["", f"| us: kernel | export | weight | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for row in timed:
        cells = [KERNELS[row["kernel"]].title, Path(row["export"]).name, str(row.get("shape", ""))]
        for count in TIMED_ROWS if row["status"] == "ran" else ():
            own, torchs = row[f"us_{count}"], row[f"us_{count}_torch"]
            cells += [f"{own:.1f}", f"{torchs:.1f}", f"{torchs / own:.2f} x"]
        if row["status"] != "ran":
            cells += [f"{row['status']}: " + re.sub(r"[|`]", " ", row["reason"]), *[""] * (len(heads) - 1)]
        lines.append("| " + " | ".join(cells) + " |")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join([*lines, "", *[f"- {note}" for note in notes], ""]), encoding="utf-8")
    (log / "rows.json").write_text(json.dumps({"rows": rows, "timed": timed}, indent=1), encoding="utf-8")


def versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("triton", "transformers", "torchao", "humming-kernels", "gptqmodel"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--limit", type=float, default=150, help="seconds of one process")
    parser.add_argument("--compile-limit", type=float, default=300, help="seconds for Marlin's compile")
    parser.add_argument("--deadline", type=float, default=540, help="seconds for all of it")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try it")
    for hidden in ("--make", "--compile", "--timed"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=list(KERNELS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        marlin = split_marlin()
        marlin._extension_api().load("marlin_fp16")
    elif arguments.make:
        make(arguments.paths[0], arguments.tiny)
    elif arguments.worker:
        work_on(KERNELS[arguments.worker](), arguments.paths, arguments.timed)
    elif len(arguments.paths) < 2:
        parser.error("WORK and OUT.md")
    else:
        run_all(arguments.paths[0], arguments.paths[1], arguments.paths[2:], arguments)


if __name__ == "__main__":
    main()
