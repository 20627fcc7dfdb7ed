"""Keys cached before RoPE are rotated as they are read, each by its own token's angles."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError


class Angles:
    """cos and sin of the tokens cached so far, [B or 1, n, rotary width] each; layers that rotate alike share them.

    Attributes:
        newest: the tensor that was added last: what tells layers that rotate alike.
    """

    def __init__(self) -> None:
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None
        self.newest: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.cos is None else self.cos.shape[1]

    def extend(self, cos: Tensor, sin: Tensor) -> None:
        """Add new tokens' angles."""
        self.newest = cos
        self.cos, self.sin = _joined(self.cos, cos), _joined(self.sin, sin)

    def reorder(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change them along the batch, unless one row serves all of it."""
        if self.cos is not None and self.sin is not None and self.cos.shape[0] > 1:
            self.cos, self.sin = change(self.cos), change(self.sin)

    def cut(self, tokens: int) -> None:
        """Keep the first ``tokens``."""
        if self.cos is not None and self.sin is not None:
            self.cos, self.sin = self.cos[:, :tokens], self.sin[:, :tokens]

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(tensor.nbytes for tensor in (self.cos, self.sin) if tensor is not None)


class Rotation:
    """k (cos, sin) as the attention module's own modelling file rotates keys; what it leaves alone stays as it is.

    Raises:
        ModelError: a modelling file without ``apply_rotary_pos_emb(q, k, cos, sin)``.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.kind = type(attention).__name__
        function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if function is None or list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
            raise self.unknown("has no apply_rotary_pos_emb(q, k, cos, sin) beside it")
        self.apply: Callable[..., Any] = function

    def __call__(self, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, H, n, D] rotated."""
        width = cos.shape[-1]
        turned: Tensor = self.apply(key[:, :1, :, :width], key[..., :width], cos, sin)[1]
        return turned if width == key.shape[-1] else torch.cat([turned, key[..., width:]], dim=-1)

    def check(self, ours: Tensor, theirs: Tensor) -> None:
        """Raise unless both are the same rotation.

        Raises:
            ModelError: the module does something else to its keys between their projection and the cache.
        """
        difference = (ours.float() - theirs.float()).abs().max()
        if not bool(difference <= 1e-2 * theirs.float().abs().max()):
            raise self.unknown("changes keys in another way than apply_rotary_pos_emb beside it")

    def unknown(self, what: str) -> ModelError:
        """The error for a module that cannot be rotated at read."""
        return ModelError(
            f"{self.kind} {what}",
            where="method.kv_cache.site=pre_rope",
            rule="a cache of keys before RoPE rotates them at each read",
            fix="method.kv_cache.site=post_rope",
        )


def _joined(old: Tensor | None, new: Tensor) -> Tensor:
    if old is None:
        return new
    rows = max(old.shape[0], new.shape[0])
    return torch.cat([old.expand(rows, -1, -1), new.expand(rows, -1, -1)], dim=1)
