"""Which attention a run trains with: packed rows document by document, and the fastest of torch's for the shape."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from qtrain.config.schema import Config
from qtrain.data.isolation import known_difference
from qtrain.kernels.document_attention import flash_refuses
from qtrain.modules.documents import NAME, attend_by_document, attends_by_document, mask_pairs

BACK_ENDS = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
}
ROUNDS = 5


@dataclass(frozen=True)
class Shape:
    """Of queries, keys and values [rows, heads, length, width]."""

    rows: int
    heads: int
    kv_heads: int
    length: int
    width: int


class Attention:
    """What was chosen for a model, and why.

    Args:
        config: ``model.attention=auto`` leaves the choice; any other value is what was asked for.
        dtype: of scores.
    """

    def __init__(self, model: PreTrainedModel, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        own = str(model.config.get_text_config()._attn_implementation)
        self._model, self._words = model, "sdpa" if own == NAME else own  # a model that was trained before
        self._order: list[SDPBackend] = []
        self._why_not = self._by_document(model, config, device, dtype)

    def _by_document(
        self, model: PreTrainedModel, config: Config, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """What keeps packed rows from being attended to document by document, "" where nobody asks; else None."""
        if not config.data.packing or config.model.attention != "auto" or not on_gpu(device):
            return ""
        if config.run.cuda_graphs:
            return "graphs replay one shape"
        kv_cache = getattr(config.method, "kv_cache", None)
        if getattr(kv_cache, "residual", 0):
            return "keys in full precision take scores in memory"
        if device.type == "cuda" and (why := _beyond_flash(model, config, device, dtype)):
            return why
        return None if attend_by_document(model) else f"attention {self._words}"

    def prove(self, model: PreTrainedModel, vocab_size: int) -> None:
        """Compare packed rows by document with packed rows under a mask; where they differ they get masks again."""
        if self._why_not is not None:
            return
        difference, tolerance = known_difference(model, vocab_size)
        if not difference <= tolerance:
            mask_pairs(model)
            self._why_not = f"logits differ by {difference:.1e} of the largest"

    def measure(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        """Time torch's back ends on rows of that shape, forward and backward, and put the fastest first."""
        if device.type != "cuda" or "sdpa" not in self._words or dtype not in (torch.bfloat16, torch.float16):
            return
        times = back_end_times(shape, dtype, device)
        self._order = sorted(times, key=lambda back_end: times[back_end])
        if self._order:
            self._words += " by " + ", ".join(f"{BACK_ENDS[one]} {times[one]:.2f} ms" for one in self._order)
            self._words += " a layer" if len(self._order) == 1 else " a layer, the first taken"

    def in_order(self) -> AbstractContextManager[None]:
        """In which torch tries the fastest first."""
        if not self._order:
            return nullcontext()
        rest = [back_end for back_end in (*BACK_ENDS, SDPBackend.MATH) if back_end not in self._order]
        return sdpa_kernel([*self._order, *rest], set_priority=True)  # none is shut out: other layers differ

    def __str__(self) -> str:
        if self._why_not is None and attends_by_document(self._model):
            return f"{self._words}; packed rows document by document, by torch's flash attention"
        return f"{self._words}; packed rows under a mask of pairs: {self._why_not}" if self._why_not else self._words


def on_gpu(device: torch.device) -> bool:
    """Where attention by document pays: a CPU runs a document after the other, and rows there are short."""
    return device.type == "cuda"


def _beyond_flash(model: PreTrainedModel, config: Config, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why each layer would go back to a mask, as far as the model's config tells."""
    if getattr(model.config.get_text_config(), "attention_dropout", 0.0):
        return "dropout of scores"
    shape = shape_of(model, config)
    return None if shape is None else flash_refuses(dtype, (shape.width, shape.width), device)


def shape_of(model: PreTrainedModel, config: Config) -> Shape | None:
    """Of a micro-batch; None where the model's config does not tell."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(config.data.batch_size, heads, kv_heads, config.data.max_length, width)


def back_end_times(shape: Shape, dtype: torch.dtype, device: torch.device) -> Mapping[SDPBackend, float]:
    """ms of causal attention, forward and backward, by each back end that takes the shape."""
    times = {}
    for back_end in BACK_ENDS:
        try:
            times[back_end] = statistics.median(_times(shape, dtype, device, back_end))
        except RuntimeError:  # it does not take these, or memory is short
            continue
    return times


def _times(shape: Shape, dtype: torch.dtype, device: torch.device, back_end: SDPBackend) -> list[float]:
    def drawn(heads: int) -> Tensor:
        # As linears leave them: [rows, length, heads, width] in memory.
        return torch.zeros(
            shape.rows, shape.length, heads, shape.width, dtype=dtype, device=device, requires_grad=True
        ).transpose(1, 2)

    query, key, value = drawn(shape.heads), drawn(shape.kv_heads), drawn(shape.kv_heads)
    grouped = shape.heads != shape.kv_heads

    def step() -> None:
        with sdpa_kernel(back_end):
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        torch.autograd.grad(y, (query, key, value), torch.ones_like(y))

    return _milliseconds(step)


def _milliseconds(step: Callable[[], None]) -> list[float]:
    found = []
    for turn in range(ROUNDS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        if turn >= 2:  # the first load libraries, and fill the allocator
            found.append(begin.elapsed_time(end))
    return found
