"""Where keys and values are before the rotary embedding: which modules' outputs hold them, and in what shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError

Parts = dict[str, Tensor]
"""``key`` and ``value``, or one of them: [B, H, S, D]."""


@dataclass(frozen=True, eq=False)
class Site(ABC):
    """One module of an attention module, whose output holds keys, values or both.

    Attributes:
        name: of the module within the attention module.
        module: what it was when hooks were set.
        head_dim: D.
    """

    name: str
    module: nn.Module
    head_dim: int

    @abstractmethod
    def take(self, output: Tensor, inputs: tuple[Any, ...]) -> Parts:
        """The parts of a forward's output."""

    @abstractmethod
    def put(self, parts: Parts, output: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        """The output with these parts in it."""


@dataclass(frozen=True, eq=False)
class Projection(Site):
    """[B, S, H D]: ``k_proj``, ``v_proj``, or a norm over all heads (OLMo 2)."""

    part: str

    def take(self, output: Tensor, inputs: tuple[Any, ...]) -> Parts:
        """One view."""
        return {self.part: output.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)}

    def put(self, parts: Parts, output: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        """A new tensor, or a view of the part."""
        return parts[self.part].transpose(1, 2).flatten(2)


@dataclass(frozen=True, eq=False)
class HeadNorm(Site):
    """[B, S, H, D] (Qwen 3) or [B, H, S, D] (Gemma 3): a norm within heads, ``k_norm`` or ``v_norm``."""

    part: str
    heads: int

    def take(self, output: Tensor, inputs: tuple[Any, ...]) -> Parts:
        """One view."""
        return {self.part: output.transpose(1, 2) if self._tokens_first(inputs[0]) else output}

    def put(self, parts: Parts, output: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        """A view of the part."""
        part = parts[self.part]
        return part.transpose(1, 2) if self._tokens_first(inputs[0]) else part

    def _tokens_first(self, x: Tensor) -> bool:
        if x.shape[1] != x.shape[2]:
            return x.shape[2] == self.heads
        # As many tokens as heads: x is a view of the projection's [B, S, H D], in which a token is the longer step.
        return x.stride(1) > x.stride(2)


@dataclass(frozen=True, eq=False)
class Interleaved(Site):
    """[B, S, H 3 D], q, k and v of a head side by side (GPT-NeoX)."""

    def take(self, output: Tensor, inputs: tuple[Any, ...]) -> Parts:
        """Two views."""
        _, key, value = output.unflatten(-1, (-1, 3 * self.head_dim)).chunk(3, dim=-1)
        return {"key": key.transpose(1, 2), "value": value.transpose(1, 2)}

    def put(self, parts: Parts, output: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        """A new tensor."""
        query = output.unflatten(-1, (-1, 3 * self.head_dim))[..., : self.head_dim]
        return torch.cat([query, parts["key"].transpose(1, 2), parts["value"].transpose(1, 2)], dim=-1).flatten(2)


@dataclass(frozen=True, eq=False)
class Concatenated(Site):
    """[B, S, (H_q + 2 H) D], all of q, then k, then v (Phi-3)."""

    heads: int

    def take(self, output: Tensor, inputs: tuple[Any, ...]) -> Parts:
        """Two views."""
        _, key, value = self._split(output)
        return {
            name: part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name, part in (("key", key), ("value", value))
        }

    def put(self, parts: Parts, output: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        """A new tensor."""
        flat = [parts[name].transpose(1, 2).flatten(2) for name in ("key", "value")]
        return torch.cat([self._split(output)[0], *flat], dim=-1)

    def _split(self, output: Tensor) -> tuple[Tensor, ...]:
        width = self.heads * self.head_dim
        parts: tuple[Tensor, ...] = output.split([output.shape[-1] - 2 * width, width, width], dim=-1)
        return parts


FUSED: dict[str, Callable[[nn.Module, int], Site]] = {
    "GPTNeoXAttention": lambda attention, dim: Interleaved(
        "query_key_value", attention.get_submodule("query_key_value"), dim
    ),
    "Phi3Attention": lambda attention, dim: Concatenated(
        "qkv_proj", attention.get_submodule("qkv_proj"), dim, key_heads(attention)
    ),
}
"""Attention classes with one projection for q, k and v, and how it lays out heads."""

KEY_NORMS = ("k_norm", "k_layernorm")
ROTATED_FIRST = ("key_layernorm", "qk_norm")
"""Norms of keys that follow the rotary embedding: HunYuan's, Llama 4's."""
ROTATES_FIRST = ("NanoChatAttention",)


def find_sites(attention: nn.Module) -> tuple[Site, ...]:
    """The modules whose outputs are keys as they enter the rotary embedding, and values.

    Raises:
        ModelError: an attention class whose layout is not known.
    """
    kind = type(attention).__name__
    dim = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    if dim is None:
        raise _unknown(kind, "has no head_dim")
    if kind in FUSED:
        return (FUSED[kind](attention, dim),)
    children = dict(attention.named_children())
    missing = [name for name in ("k_proj", "v_proj") if name not in children]
    if missing:
        raise _unknown(kind, f"has no {' and no '.join(missing)}; its modules are {', '.join(children)}")
    if kind in ROTATES_FIRST or any(name in children for name in ROTATED_FIRST):
        raise _unknown(kind, "normalizes keys after it has rotated them")
    norms = {"key": KEY_NORMS, "value": ("v_norm",)}
    return tuple(
        _site(attention, next((norm for norm in norms[part] if norm in children), projection), dim, part)
        for part, projection in (("key", "k_proj"), ("value", "v_proj"))
    )


def key_heads(attention: nn.Module) -> int:
    """H_kv."""
    config: Any = attention.config
    return int(config.num_key_value_heads)


def _site(attention: nn.Module, name: str, dim: int, part: str) -> Site:
    module = attention.get_submodule(name)
    if name.endswith("_proj"):
        return Projection(name, module, dim, part)
    weight = getattr(module, "weight", None)
    if weight is not None and weight.shape[-1] != dim:
        return Projection(name, module, dim, part)
    return HeadNorm(name, module, dim, part, key_heads(attention))


def _unknown(kind: str, what: str) -> ModelError:
    return ModelError(
        f"{kind} {what}",
        where="method.kv_cache.site=pre_rope",
        rule="keys and values are quantized at the outputs of k_proj (or k_norm) and v_proj, or of a fused projection "
        f"of {' or '.join(FUSED)}",
        fix="method.kv_cache.site=post_rope",
    )
