"""Shapes of Llamas with random weights: speed and memory do not depend on the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What decides the products of a Llama.

    Attributes:
        kv_heads: of grouped-query attention.
        tied: lm_head is the token embedding.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    context: int = 32768

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of transformers.LlamaConfig."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.context,
        }

    @property
    def weights(self) -> int:
        """P: weights of products, the layers' and the head's."""
        keys = self.hidden // self.heads * self.kv_heads
        layer = 2 * self.hidden * (self.hidden + keys) + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocab * self.hidden

    def flops_per_token(self, *, trains: bool) -> int:
        """4 P where the weights are frozen, 6 P where they train; adapters, attention, recomputation left out."""
        return (6 if trains else 4) * self.weights

    def tiny(self) -> Shape:
        """The same proportions for a CPU."""
        kv_heads = 4 if self.kv_heads == self.heads else 2
        return replace(
            self, hidden=128, intermediate=256, layers=2, heads=4, kv_heads=kv_heads, vocab=512, context=2048
        )


LLAMA_7B = Shape(4096, 11008, 32, 32, 32, 32000)
LLAMA_65B = Shape(8192, 22016, 80, 64, 64, 32000)
LLAMA_70B = Shape(8192, 28672, 80, 64, 8, 128256)
"""Llama 3."""
LLAMA_1B = Shape(2048, 8192, 16, 32, 8, 128256, tied=True)
"""Llama 3.2."""
LAYERS_7B = replace(LLAMA_7B, layers=4)
"""As many layers of the 7B's width as full fine-tuning in fp32 fits beside their optimizer's state."""
