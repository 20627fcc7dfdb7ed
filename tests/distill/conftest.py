"""The formulas of the papers in plain torch, the judge of every fused path; and a measure of the largest tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtrain.distill.divergence import Objective

Judge = Callable[[Tensor, Tensor, Tensor, Objective], Tensor]


def divergence(log_p: Tensor, log_q: Tensor, objective: Objective) -> Tensor:
    """D of each row, of log-probabilities [N, V], by F.kl_div (input and target in its own order)."""

    def kl(target: Tensor, given: Tensor) -> Tensor:
        return F.kl_div(given, target, reduction="none", log_target=True).sum(-1)

    if objective.loss == "forward_kl":
        return kl(log_p, log_q)
    if objective.loss == "reverse_kl":
        return kl(log_q, log_p)
    beta = objective.jsd_beta
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


@pytest.fixture(scope="session")
def judge() -> Judge:
    """(student's logits, teacher's logits or log P of the top k, labels, objective) → the summed loss."""

    def loss(logits: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> Tensor:
        kept = labels != -100
        logits, teacher, labels = logits[kept], teacher[kept], labels[kept]
        t, w = objective.temperature, objective.ce_weight
        rows = divergence((teacher / t).log_softmax(-1), (logits / t).log_softmax(-1), objective)
        return (1 - w) * t**2 * rows.sum() + w * F.cross_entropy(logits, labels, reduction="sum")

    return loss


class Largest(TorchDispatchMode):
    """Bytes of the largest floating-point tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        self.bytes = max([self.bytes, *(tensor.numel() * tensor.element_size() for tensor in tensors)])
        return result


@pytest.fixture(scope="session")
def largest() -> type[Largest]:
    return Largest
