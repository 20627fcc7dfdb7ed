"""Whether a model's logits are a product that can be taken in chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from qtrain.distill.chunked_loss import product_dtype
from qtrain.modules.eval_mode import eval_mode

Head = Callable[[PreTrainedModel, Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""(model, hidden [..., d]) → what its output head multiplies: input [..., d], weight [vocab, d], bias [vocab].

A quantized head gives its fake-quantized weight here, and input where that is quantized too, both differentiable.
"""


def not_a_product(model: PreTrainedModel, head: Head) -> str | None:
    """Why the head's factors do not give the model's logits (soft-capping, a scale, ...); None where they do."""
    inputs = {"input_ids": torch.arange(1, 9, device=next(model.parameters()).device)[None], "use_cache": False}
    try:
        with eval_mode(model), torch.no_grad():
            logits = model(**inputs).logits
            x, weight, bias = head(model, model.get_decoder()(**inputs).last_hidden_state)
            dtype = product_dtype(weight)
            product = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
            distance = (product.float() - logits.float()).norm() / logits.float().norm()
    except (AttributeError, TypeError, NotImplementedError, RuntimeError) as error:
        return " ".join(str(error).split())[:80]
    # Both are the same product in the same dtype, up to the order of its sums; an int8 head is 0.7 % away.
    return None if distance < (4e-3 if dtype.itemsize < 4 else 1e-4) else "this head is more than a product"
