"""Bytes of the tensors that are alive: what a GPU's allocator counts, counted for a CPU, whose allocator does not."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WITHIN = {torch.ops.aten.logsumexp.default: 1.0}
"""What an operation takes for itself and gives back before it returns, as a share of its first input."""

REAL_FLOPS = 2e9
"""A CPU does them in the 0.2 s that fake tensors take for a decoder layer."""


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, as long as they live, and the most there ever were at once.

    The resident set of a process would say less: it holds the interpreter and its libraries (ten times a tiny
    model), and what malloc keeps for later. Each operation is seen below autograd, in the backward pass too; with fake
    tensors the count is the same, and no number is computed.

    Args:
        start: bytes that are there already.
    """

    def __init__(self, start: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = start
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in WITHIN:
            self.peak = max(self.peak, self.now + int(given[0].nbytes * WITHIN[func]))
        found = func(*args, **kwargs)
        known = set(map(self._place, given))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and place(leaf) not in known | self._alive:
                self._count(leaf.untyped_storage())
        return found

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def _place(self, tensor: Tensor) -> int:
        return place(tensor)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        weakref.finalize(storage, self._let_go, key, size).atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)

    def _let_go(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class ShapeBytes(LiveBytes):
    """The same, of operations that compute no number: their results have shapes alone (torch's FakeTensor).

    What was there before, such as weights, takes part by its shape and is not counted.

    Args:
        chosen: what a search in a mask finds (``nonzero``), which its numbers would tell.
    """

    def __init__(self, chosen: int = 0) -> None:
        super().__init__()
        self._fake, self._chosen = FakeTensorMode(allow_non_fake_inputs=True), chosen

    def __enter__(self) -> Self:
        self._quiet = warnings.catch_warnings()
        self._quiet.__enter__()
        # What keeps an input's codes for the next layer asks whether it is the same input, by its place too.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # asked by torch itself
        self._fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self._fake.__exit__(*raised)  # type: ignore[arg-type]
        self._quiet.__exit__(*raised)  # type: ignore[arg-type]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # a seed that is drawn, a check that holds: whatever is asked of a number
        if func is torch.ops.aten.nonzero.default:
            return super().__torch_dispatch__(
                torch.ops.aten.empty.memory_format, types, ([self._chosen, args[0].ndim],), {"dtype": torch.int64}
            )
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _place(self, tensor: Tensor) -> int:
        return place(tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor))


class AllocatedBytes:
    """The same two figures from the allocator of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> AllocatedBytes:
        torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def now(self) -> int:
        """At this moment."""
        return torch.cuda.memory_allocated(self.device)

    @property
    def peak(self) -> int:
        """The most since it was entered."""
        return torch.cuda.max_memory_allocated(self.device)


def meter(device: torch.device, flops: float, chosen: int = 0) -> AllocatedBytes | LiveBytes:
    """The one for work of so many FLOPs: a GPU does it, a CPU where that is quicker than to follow the shapes.

    Args:
        chosen: what a search in a mask finds, see :class:`ShapeBytes`.
    """
    if device.type == "cuda":
        return AllocatedBytes(device)
    return LiveBytes() if flops < REAL_FLOPS else ShapeBytes(chosen)


def place(tensor: Tensor) -> int:
    """What tensors have in common that share their memory."""
    return int(tensor.untyped_storage()._cdata)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Of their memory, what is shared counted once; the meta device's too."""
    return sum({place(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
