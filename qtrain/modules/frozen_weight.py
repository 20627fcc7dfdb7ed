"""Frozen layers as blocks of kernels multiply with them: the dense weight for a moment, in memory used again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.kernels.lora_part import FrozenWeight, Made
from qtrain.kernels.nf4_dequantize import Dequantize, nf4_dequantize, nf4_fp8_codes, writes_apart
from qtrain.modules.frozen_linear import frozen_kind
from qtrain.modules.packed_linear import PackedLinear


class Workspace:
    """Memory for one dense weight at a time, as large as the largest so far.

    Work on one stream runs in order, so that a weight is read before the next takes its place; each stream has its own.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    def take(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """[out, in], its content whatever was there."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key, size = (device, dtype, stream), shape[0] * shape[1]
        memory = self._memory.get(key)
        if memory is None or memory.numel() < size:
            self._memory.pop(key, None)
            memory = self._memory[key] = torch.empty(size, dtype=dtype, device=device)
        return memory[:size].view(shape)

    def nbytes(self) -> int:
        """Held by now."""
        return sum(memory.nbytes for memory in self._memory.values())


class Dequantized(ABC):
    """What is multiplied as a dense weight, there for the product alone."""

    _layer: Any

    @abstractmethod
    def weight(self, dtype: torch.dtype) -> Tensor:
        """W [out, in], to be used up before any other is asked for."""

    def fp8_codes(self, scale: Tensor, dtype: torch.dtype, turn: bool, out: Tensor | None = None) -> Tensor | None:
        """q float8_e4m3fn [out, in] of ``fp8_rows``, or [in, out], straight from the storage; None where none are.

        Args:
            out: memory for them; of those that are turned over, maybe some columns of wider rows.
        """
        return None

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """b [out]."""
        bias: Tensor | None = self._layer.bias
        return None if bias is None else bias.to(dtype)

    def product(self, x: Tensor, made: Made) -> Tensor:
        """x W^T + b."""
        return F.linear(x, self.weight(x.dtype), self.bias(x.dtype))

    def input_gradient(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        """dy W, added to ``into``."""
        weight = self.weight(dy.dtype)
        return dy @ weight if into is None else into.addmm_(dy, weight)


class FourBit(Dequantized):
    """NF4 or FP4."""

    def __init__(self, layer: bnb.nn.Linear4bit, workspace: Workspace, dequantize: Dequantize) -> None:
        self._layer, self._workspace, self._dequantize = layer, workspace, dequantize
        self._apart: tuple[int, torch.dtype, bool] | None = None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W, overwritten by the next one."""
        words, state = self._layer.weight, self._layer.quant_state  # gathered under FSDP2, a weight has no state
        stored = torch.float32 if dtype == torch.float64 else dtype
        # bitsandbytes' kernels for CPUs write into memory of their own alone.
        out = self._workspace.take(tuple(state.shape), stored, words.device) if words.is_cuda else None
        weight: Tensor = self._dequantize(words, state, stored, out)
        return weight.to(dtype)

    def widens(self, dtype: torch.dtype, ranks: Sequence[int]) -> bool:
        """Whether a kernel writes W with columns of others beside it."""
        words = self._layer.weight
        place = words.data_ptr()
        # Asked several times a step of each weight, whose parts bitsandbytes' class is slow to tell.
        if self._apart is None or self._apart[:2] != (place, dtype):
            known = self._dequantize is nf4_dequantize and writes_apart(words, self._layer.quant_state, dtype)
            self._apart = place, dtype, known
        return self._apart[2] and not any(rank % 8 for rank in ranks)

    def widened(self, dtype: torch.dtype, before: int, after: int) -> Tensor:
        """[out, before + in + after], W in the middle and the rest to be written; overwritten by the next one."""
        words, state = self._layer.weight, self._layer.quant_state
        rows, columns = state.shape
        whole = self._workspace.take((rows, before + columns + after), dtype, words.device)
        self._dequantize(words, state, dtype, whole[:, before : before + columns])
        return whole

    def heightened(self, dtype: torch.dtype, below: int) -> Tensor:
        """[out + below, in], W first and the rest to be written; overwritten by the next one."""
        words, state = self._layer.weight, self._layer.quant_state
        rows, columns = state.shape
        whole = self._workspace.take((rows + below, columns), dtype, words.device)
        self._dequantize(words, state, dtype, whole[:rows])
        return whole

    def fp8_codes(self, scale: Tensor, dtype: torch.dtype, turn: bool, out: Tensor | None = None) -> Tensor | None:
        """By a kernel that reads the 4 bits."""
        words, state = self._layer.weight, self._layer.quant_state
        known = self._dequantize is nf4_dequantize
        return nf4_fp8_codes(words, state, scale, dtype, turn, out) if known else None


class Int8(Dequantized):
    """LLM.int8() as bitsandbytes multiplies it: inputs in int8 too, but for outlier columns, and dense on a CPU.

    The codes of an input are made once for all weights that are given it (Dettmers 2022, arXiv 2208.07339).
    """

    def __init__(self, layer: bnb.nn.Linear8bitLt, workspace: Workspace) -> None:
        self._layer, self._workspace = layer, workspace

    def product(self, x: Tensor, made: Made) -> Tensor:
        """x W^T + b, to the bit the layer's own."""
        if not multiplies_bytes(x.device):
            dense: Tensor = self._layer(x)
            return dense
        state = self._layer.state
        name = f"int8, outliers from {state.threshold}"
        if name not in made:  # the kernel reads rows one after the other, whatever the strides
            made[name] = int8_vectorwise_quant(x.to(torch.float16).contiguous(), threshold=state.threshold)
        codes, largest, outliers = made[name]
        operands, bias = (codes, state.CB, largest, state.SCB), self.bias(x.dtype)
        if not state.threshold:
            y: Tensor = torch.ops.bitsandbytes.int8_scaled_mm(*operands, bias=bias, dtype=x.dtype)
            return y
        y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x, *operands, outliers, bias)
        return y

    def weight(self, dtype: torch.dtype) -> Tensor:
        """q SCB / 127, as bitsandbytes' own backward takes it; on a GPU overwritten by the next one."""
        codes, largest = self._layer.state.CB, self._layer.state.SCB
        assert codes is not None and largest is not None
        scale = largest.unsqueeze(1).mul(1.0 / 127.0)
        if codes.is_cuda:
            return torch.mul(codes, scale, out=self._workspace.take(tuple(codes.shape), dtype, codes.device))
        weight: Tensor = codes.to(dtype, copy=True).mul_(scale)
        return weight


class Packed(Dequantized):
    """Packed integers."""

    def __init__(self, layer: PackedLinear) -> None:
        self._layer = layer

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(q - z) s."""
        weight: Tensor = self._layer.dense_weight(dtype)
        return weight


class Dense(Dequantized):
    """Plain numbers."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W itself where it has that dtype."""
        weight: Tensor = self._layer.weight.to(dtype)
        return weight


def multiplies_bytes(device: torch.device) -> bool:
    """Whether bitsandbytes multiplies the codes of LLM.int8() there, in training; else their dense weight."""
    return device.type not in ("cpu", "xpu")


def frozen_weight(layer: nn.Module, workspace: Workspace, dequantize: Dequantize) -> FrozenWeight | str:
    """The weight of a frozen linear, or in words why no block takes it."""
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return "the layer under the adapter trains"
    if isinstance(layer, PackedLinear):
        return Packed(layer) if layer.input_quantizer is None else "the base quantizes its inputs"
    if isinstance(layer, bnb.nn.Linear4bit):
        state = getattr(layer.weight, "quant_state", None)
        if state is None or getattr(state, "packing_format_for_cpu", False):
            return "4-bit weights in a layout of their own"
        layer.quant_state = state
        return FourBit(layer, workspace, dequantize)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return Int8(layer, workspace) if layer.state.CB is not None else "int8 weights that are not quantized yet"
    if type(layer) is nn.Linear:
        return Dense(layer)
    return f"no dense weight of {frozen_kind(layer) or type(layer).__name__}"
