"""Whether a block of kernels gives what the layers give that it stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from qtrain.modules.fused_layers import Member

Context = Callable[[], AbstractContextManager[Any]]
Run = Callable[[Tensor], tuple[Tensor, ...] | None]
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Of a norm, by the dtype of the products: a few times what TF32 and bf16 come to (8e-3 over bf16, measured)."""
DIFFERS = "results that differ from a block's"
TOKENS = 64
"""Up to 32 rows may go through a kernel of bitsandbytes (0.50, on a GPU) that rounds each product to bf16 before it is
summed: 3e-2 of dL/dx of SmolLM2's MLP, of which a block and the kernels for more rows are 4e-3 away from float64."""


class BlockProof:
    """Compares outputs and gradients on random numbers of two magnitudes, once for blocks of the same kind.

    Args:
        context: what training runs in, such as its autocast.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._verdicts: dict[object, tuple[str | None, bool]] = {}

    def why_not(self, kind: object, layers: Run, block: Run, members: Sequence[Member], like: Tensor) -> str | None:
        """What keeps ``block`` from being ``layers`` but for rounding, in words; None where nothing does.

        It tells the members which dtype their outputs have.

        Args:
            kind: equal for blocks of which one is as good a witness as another.
            members: whose factors B are drawn at random for as long, since they begin at zero.
            like: an input [.., tokens, in] as the layers are given it.
        """
        if kind not in self._verdicts:
            self._verdicts[kind] = self._compare(layers, block, members, like)
        why, follows = self._verdicts[kind]
        for member in members:
            member.follows_input = follows
        return why

    def _compare(self, layers: Run, block: Run, members: Sequence[Member], like: Tensor) -> tuple[str | None, bool]:
        generator = torch.Generator().manual_seed(0)
        # On the CPU even where a strategy makes its device the default one: the generator is there.
        x = torch.randn(*like.shape[:-2], TOKENS, like.shape[-1], generator=generator, device="cpu")
        x[..., ::2, :] *= 30.0  # where clamps and soft caps show
        x = x.to(like.device, like.dtype)
        with _stirred(members, generator):
            wanted = self._outcome(layers, x, members)
            assert wanted is not None
            follows = wanted[0].dtype == x.dtype
            for member in members:
                member.follows_input = follows
            try:
                found = self._outcome(block, x, members)
            except Exception as error:  # a compiler that is not there, a chip a kernel does not fit: anything
                return (
                    f"kernels that do not run here ({type(error).__name__}: {' '.join(str(error).split())[:80]})",
                    follows,
                )
        if found is None:
            return "products in another dtype than the training's", follows
        tolerance = TOLERANCES[self._product_dtype(x)]
        factors = [f"dL/d{factor} of {member.name}" for member in members for factor in "AB"]
        outputs = ["y"] if len(wanted) == 2 + len(factors) else [f"y of {member.name}" for member in members]
        name, far = farthest(found, wanted, [*outputs, "dL/dx", *factors])
        return None if far <= tolerance else f"{DIFFERS} ({name} by {far:.2g} of its norm)", follows

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        with self._context():
            return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype

    def _outcome(self, run: Run, x: Tensor, members: Sequence[Member]) -> list[Tensor] | None:
        """Outputs, and gradients of x and of the factors."""
        x = x.clone().requires_grad_()
        with torch.enable_grad(), self._context():
            ys = run(x)
        if ys is None:
            return None
        factors = [factor for member in members for factor in (member.linear().a, member.linear().b)]
        generator = torch.Generator().manual_seed(1)
        upper = [torch.randn(y.shape, generator=generator, device="cpu").to(y.device, y.dtype) for y in ys]
        return [*ys, *torch.autograd.grad(ys, (x, *factors), upper)]


@contextmanager
def _stirred(members: Sequence[Member], generator: torch.Generator) -> Iterator[None]:
    factors = [member.linear().b for member in members]
    kept = [b.detach().clone() for b in factors]
    try:
        with torch.no_grad():
            for b in factors:
                b.copy_(torch.randn(b.shape, generator=generator, device="cpu").mul_(0.1))
        # A cast that autocast made of B before, and keeps until it ends, would be multiplied in its place.
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            for b, own in zip(factors, kept, strict=True):
                b.copy_(own)
        torch.clear_autocast_cache()


def farthest(found: Sequence[Tensor], wanted: Sequence[Tensor], names: Sequence[str]) -> tuple[str, float]:
    """Whose results lie farthest apart, and by which share of their norm."""
    pairs = zip(names, map(_distance, found, wanted), strict=True)
    return max(pairs, key=lambda pair: pair[1])


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Of the worst row where there are tokens, else as a whole: a factor's gradient has rows of noise."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return math.inf
    one, other = found.detach().double(), wanted.detach().double()
    if one.ndim == 2:
        one, other = one.flatten(), other.flatten()
    apart, norm = (one - other).norm(dim=-1), other.norm(dim=-1)
    shares = torch.where(apart == 0, apart, apart / norm)  # rows of zeros are equal
    return math.inf if bool(shares.isnan().any()) else float(shares.max()) if shares.numel() else 0.0
