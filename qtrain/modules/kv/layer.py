"""One layer of a cache of codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from qtrain.errors import ModelError
from qtrain.modules.kv.codes import Codes
from qtrain.modules.kv.quantizer import KVQuantizer
from qtrain.modules.kv.residual import seen_pairs, without_padding
from qtrain.modules.kv.rotation import Angles, Rotation
from qtrain.modules.kv.sites import Parts

Angular = tuple[Tensor, Tensor]


class CodedLayer(CacheLayerMixin):
    """Keys as attention sees them, and values, as codes.

    Sliding-window layers keep all tokens too; masks hide those that are out of sight.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, attention: nn.Module, quantizer: KVQuantizer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.quantizer = quantizer
        self.key = Codes(quantizer.key, quantizer.key_layout)
        self.value = Codes(quantizer.value, quantizer.value_layout)

    def enter(self, given: Mapping[str, Any]) -> None:
        """Called as the attention module begins a forward with this cache; ``given``: its arguments."""

    def see(self, parts: Parts) -> None:
        """Keys and values before RoPE, where there is a hook."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store [B, H_kv, n, D] and return what attention multiplies with: all tokens, from their codes."""
        self.check_in_use()
        self.key.append(key_states)
        self.value.append(value_states)
        return self.key.read(), self.value.read()

    def check_in_use(self) -> None:
        """Raise unless attention knows that what it gets is on its levels already.

        Raises:
            ModelError: the cache was passed on without its context.
        """
        if self.quantizer.reader is not self:
            raise ModelError(
                "a cache of codes outside its context: keys and values would be quantized twice",
                fix="with quantized_cache(model) as cache: model.generate(..., past_key_values=cache)",
            )

    def reorder(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every stored tensor by what ``change`` makes of it along the batch."""
        for codes in (self.key, self.value):
            codes.reorder(change)

    def cut(self, tokens: int) -> None:
        """Keep the first ``tokens``."""
        for codes in (self.key, self.value):
            codes.cut(tokens)

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.key.nbytes + self.value.nbytes

    @property
    def numel(self) -> int:
        """Keys' and values' numbers."""
        return self.key.numel + self.value.numel

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return len(self.value)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and the first one's position."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated ahead."""

    def reset(self) -> None:
        """Forget all tokens."""
        self.key.clear()
        self.value.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens; ``tokens_to_remove`` is minus their number."""
        if tokens_to_remove > 0:
            raise ModelError(f"crop({tokens_to_remove})", rule="crop takes minus the number of tokens to drop")
        if tokens_to_remove:
            self.cut(max(0, self.get_seq_length() + tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch ``repeats`` times."""
        self.reorder(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows of the batch."""
        self.reorder(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))


class RotatedLayer(CodedLayer):
    """Keys before RoPE as codes, rotated as they are read.

    Args:
        angles: of the layers so far; a layer with the same position embeddings shares them.
    """

    def __init__(self, attention: nn.Module, quantizer: KVQuantizer, angles: list[Angles]) -> None:
        super().__init__(attention, quantizer)
        self.rotation = Rotation(attention)
        self.known, self.angles, self.owner = angles, Angles(), False
        self.new_angles: Angular | None = None
        self.parts: Parts = {}

    def enter(self, given: Mapping[str, Any]) -> None:
        """Take the new tokens' angles."""
        angles = given.get("position_embeddings")
        if angles is None:
            raise self.rotation.unknown("is not given its position embeddings by name")
        self.new_angles, self.parts = angles, {}

    def see(self, parts: Parts) -> None:
        """Take keys and values as they come from the projections."""
        self.parts = self.parts | parts

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store what was seen before RoPE; return all keys rotated."""
        self.check_in_use()
        first = not len(self.value)
        self.key.append(self.parts["key"])
        self.value.append(self.parts["value"])
        self._extend(first)
        assert self.angles.cos is not None and self.angles.sin is not None
        key = self.rotation(self.key.read(), self.angles.cos, self.angles.sin)
        if first:
            self.rotation.check(key, key_states)
        self.new_angles, self.parts = None, {}
        return key, self.value.read()

    def reorder(self, change: Callable[[Tensor], Tensor]) -> None:
        """With the angles, once for all layers that share them."""
        super().reorder(change)
        if self.owner:
            self.angles.reorder(change)

    def cut(self, tokens: int) -> None:
        """With the angles."""
        super().cut(tokens)
        self.angles.cut(tokens)

    def reset(self) -> None:
        """With the angles."""
        super().reset()
        self.known.clear()
        self.angles, self.owner = Angles(), False

    @property
    def nbytes(self) -> int:
        """Bytes stored; shared angles count for one layer."""
        return super().nbytes + (self.angles.nbytes if self.owner else 0)

    def _extend(self, first: bool) -> None:
        assert self.new_angles is not None
        cos, sin = self.new_angles
        if first:
            shared = next((angles for angles in self.known if angles.newest is cos), None)
            self.owner = shared is None
            self.angles = shared or Angles()
            if self.owner:
                self.known.append(self.angles)
        if len(self.angles) < len(self.value):
            self.angles.extend(cos, sin)


class WindowedLayer(CodedLayer):
    """Old keys and values as codes, the newest in full precision (``Window`` says which).

    Attributes:
        coded: keys and values [B, H, n, D] that the last query sees as codes; ``update`` returns all tokens, those
            that a query of this forward may see in full precision so.
    """

    is_croppable = False

    def __init__(self, attention: nn.Module, quantizer: KVQuantizer) -> None:
        super().__init__(attention, quantizer)
        assert quantizer.window is not None
        self.window = quantizer.window
        self.coded: tuple[Tensor, Tensor]
        self.tails: list[Tensor] = []
        self.pairs: Tensor | None = None

    def enter(self, given: Mapping[str, Any]) -> None:
        """Take the mask."""
        self.pairs = seen_pairs(given.get("attention_mask"))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens and move those that leave the window to codes."""
        self.check_in_use()
        seen = self.get_seq_length() + key_states.shape[2]
        key_states = without_padding(key_states, self.pairs)
        tails = self.tails or [key_states[:, :, :0], value_states[:, :, :0]]
        sides = (
            (self.key, tails[0], key_states, self.window.keys(seen)),
            (self.value, tails[1], value_states, self.window.values(seen)),
        )
        whole, coded, self.tails = [], [], []
        for codes, tail, new, bound in sides:
            old = codes.read() if len(codes) else new[:, :, :0]
            fresh = torch.cat([tail, new], dim=2)
            moved = bound - len(codes)
            codes.append(fresh[:, :, :moved])
            whole.append(torch.cat([old, fresh], dim=2))
            coded.append(codes.read() if moved else old)
            self.tails.append(fresh[:, :, moved:].clone())
        self.coded = coded[0], coded[1]
        return whole[0], whole[1]

    def reorder(self, change: Callable[[Tensor], Tensor]) -> None:
        """With the window."""
        super().reorder(change)
        self.tails = [change(tail) for tail in self.tails]

    def cut(self, tokens: int) -> None:
        """While all that goes is in the window, and nothing must come back to it.

        Raises:
            ModelError: codes would have to become full precision again.
        """
        if self.window.keys(tokens) < len(self.key) or self.window.values(tokens) < len(self.value):
            raise ModelError(
                f"a cache with a window of full precision cut from {self.get_seq_length()} tokens to {tokens}",
                rule="what has become codes cannot return to the window",
                fix="method.kv_cache.share=per_head method.kv_cache.residual=0, or decode without rolling back",
            )
        bounds = (len(self.key), len(self.value))
        self.tails = [tail[:, :, : tokens - bound].clone() for tail, bound in zip(self.tails, bounds, strict=True)]

    def reset(self) -> None:
        """With the window."""
        super().reset()
        self.tails = []

    def get_seq_length(self) -> int:
        """Tokens stored, those in the window too."""
        return len(self.value) + (self.tails[1].shape[2] if self.tails else 0)

    @property
    def nbytes(self) -> int:
        """Bytes stored, the window included."""
        return super().nbytes + sum(tail.nbytes for tail in self.tails)

    @property
    def numel(self) -> int:
        """Keys' and values' numbers, the window included."""
        return super().numel + sum(tail.numel() for tail in self.tails)
