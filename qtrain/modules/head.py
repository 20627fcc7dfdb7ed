"""What a model's output head multiplies, quantized or not."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from qtrain.kernels.shared_input import forget_inputs
from qtrain.modules.quant_embedding import QuantEmbedding
from qtrain.modules.quant_linear import QuantLinear


def head_factors(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x [.., d], weight [vocab, d], bias [vocab]), on their levels, with gradients: logits = x W^T + b."""
    forget_inputs()  # the decoder is done, and logits take more memory than any layer
    head = model.get_output_embeddings()
    if isinstance(head, QuantLinear):
        quantizer = head.input_quantizer
        return hidden if quantizer is None else quantizer(hidden), head.quantized_weight(), head.bias
    weight = head.quantized_weight() if isinstance(head, QuantEmbedding) else head.weight
    return hidden, weight, getattr(head, "bias", None)
