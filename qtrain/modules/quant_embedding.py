"""An embedding whose rows are looked up on their levels."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.modules.config import QuantizerSection
from qtrain.modules.quantizer import Quantizer
from qtrain.numerics.affine import QParams


class QuantEmbedding(nn.Embedding):
    """Rows of fq(E); the table is quantized whole only where its rows share scales, else the rows that are asked for.

    A tied lm_head that is quantized too shares weight and quantizer: one set of codes.
    """

    weight_quantizer: Quantizer

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, weight: QuantizerSection) -> Self:
        """The same table, fake-quantized; the parameter is shared."""
        new = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            embedding.max_norm,
            embedding.norm_type,
            embedding.scale_grad_by_freq,
            embedding.sparse,
            device="meta",
        )
        new.weight = embedding.weight
        new.weight_quantizer = Quantizer(weight, embedding.weight)
        new.train(embedding.training)
        return new

    def codes(self) -> tuple[Tensor, QParams]:
        """Codes [rows, dim] of the table and what maps them back."""
        return self.weight_quantizer.codes(self.weight)

    def quantized_weight(self) -> Tensor:
        """The table on its levels, with gradients."""
        table: Tensor = self.weight_quantizer(self.weight)
        return table

    def forward(self, input: Tensor) -> Tensor:
        """Ids [..] to rows [.., dim]."""
        by_rows = self.weight_quantizer.section.range == "dynamic" and self.weight_quantizer.spec.granularity in (
            "per_channel",
            "per_token",
            "per_group",
        )
        if by_rows:
            # A row's scale is its own: quantizing 49,152 rows to look up 2,048 would be 24 times the work.
            rows = F.embedding(input, self.weight, self.padding_idx, self.max_norm, self.norm_type)
            flat: Tensor = self.weight_quantizer(rows.reshape(-1, rows.shape[-1]))
            return flat.reshape(rows.shape)
        return F.embedding(input, self.quantized_weight(), self.padding_idx)
