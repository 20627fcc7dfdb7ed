"""Micro-batches of one optimizer step, run again with less memory where it does not suffice."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from qtrain.errors import ModelError
from qtrain.kernels.shared_input import forget_inputs
from qtrain.modules.documents import DOCUMENTS, LONGEST
from qtrain.modules.shared_outputs import forget_outputs
from qtrain.modules.token_loss import KEPT, Loss
from qtrain.training.recompute import Recompute

FIRST_STEPS = 10
"""Optimizer steps in which a lack of memory is answered; one that comes later has another cause than the shapes."""

OUT_OF_MEMORY = "what was above ran out of memory"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """A batch, and the random state that its dropout began from.

    Attributes:
        rows: B, which the batch can be divided by.
        random: states of the CPU's generator and of the GPU's.
    """

    batch: Mapping[str, Tensor]
    rows: int
    random: tuple[Tensor, Tensor | None]

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> MicroBatch:
        """With the state of now."""
        device = batch["input_ids"].device
        on_gpu = device.type == "cuda"
        random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
        return cls(batch, batch["input_ids"].shape[0], random)

    def rewind(self) -> None:
        """Back to the random state that this batch was first run from."""
        cpu, gpu = self.random
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, self.batch["input_ids"].device)

    def parts(self, count: int) -> list[Mapping[str, Tensor]]:
        """The rows in ``count`` shares, or one each where they are fewer, each with its own number of loss tokens."""
        count = min(count, self.rows)  # the last micro-batch of an epoch is smaller than those that set the count
        if count == 1:
            return [self.batch]
        shares: list[Mapping[str, Tensor]] = []
        for rows in torch.arange(self.rows).tensor_split(count):
            first, last = int(rows[0]), int(rows[-1]) + 1
            whole = {k: v for k, v in self.batch.items() if k not in (KEPT, DOCUMENTS, LONGEST)}  # of all rows
            share = {k: v[first:last] if v.ndim and len(v) == self.rows else v for k, v in whole.items()}
            share["loss_tokens"] = (share["labels"][:, 1:] != -100).sum()
            shares.append(share)
        return shares


class AccumulationWindow:
    """Loss and backward of the micro-batches between two optimizer steps, as Lightning asks for them one by one.

    Where memory runs out in the first steps, the level of recomputation goes one down; at the lowest the micro-batches
    are divided in two. A forward is run again. A backward may have added to some gradients already: they are
    cleared and the window is run again from its first micro-batch, each from the random state that it began with,
    so that the step is the one that would have been made.

    Where a window is one micro-batch of one process, its number of tokens is known before its backward, which then
    gives the gradient of the mean over them (``means``): no pass over all gradients is needed to divide them later.

    Args:
        loss: summed loss of a batch.
        recompute: the levels.
        parameters: what trains.
        context: of forward passes, such as autocast.
        scale: what Lightning divides each loss by.
        alone: whether this process trains alone; others would wait at their exchange of gradients for ever.

    Attributes:
        since: from when on a GPU has the sums of the window that was closed last, where that is before its backward.
    """

    def __init__(
        self,
        loss: Loss,
        recompute: Recompute,
        parameters: Callable[[], Iterable[Tensor]],
        context: Callable[[], AbstractContextManager[None]],
        scale: Callable[[], int],
        *,
        alone: bool = True,
    ) -> None:
        self._loss, self._recompute, self._parameters = loss, recompute, parameters
        self._context, self._scale = context, scale
        self._alone = alone
        self._left = FIRST_STEPS if alone else 0
        self._parts = 1
        self._kept: list[MicroBatch] = []
        self._sums: list[Tensor] = []
        self._summed_up: torch.cuda.Event | None = None
        self.since: torch.cuda.Event | None = None
        self._tokens: Tensor | None = None  # of the micro-batch that ``forward`` had last, whole

    @property
    def means(self) -> bool:
        """Whether gradients are those of the mean over the window's tokens; else of the sum, divided by ``scale``."""
        return self._alone and self._scale() == 1

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Summed loss of a micro-batch, or of its first part; the rest follows in ``backward``.

        Raises:
            ModelError: memory does not suffice, and no way is left; late in the training it is torch's error.
        """
        self._tokens = batch["loss_tokens"]
        if not self._left and self._parts == 1:
            try:
                return self._summed(batch)
            except torch.OutOfMemoryError as error:
                if self._alone:
                    raise
                raise self._among_others(error) from error
        micro = MicroBatch.of(batch)
        self._kept = [*self._kept, micro] if self._left else [micro]
        while True:
            try:
                return self._summed(micro.parts(self._parts)[0])
            except torch.OutOfMemoryError as error:
                if not self._left:
                    raise
                what = str(error)
            self._give_way(what)  # out here, where the failed pass is no longer held by its exception
            micro.rewind()

    def backward(self, loss: Tensor) -> None:
        """Gradients of what ``forward`` gave, and of the parts that are left.

        Raises:
            ModelError: as in ``forward``.
        """
        assert self._tokens is not None
        try:
            loss.backward(self._weight(loss, self._tokens))
            if self._parts > 1:
                self._run(self._kept[-1].parts(self._parts)[1:], self._tokens)
            return
        except torch.OutOfMemoryError as error:
            if not self._alone:
                raise self._among_others(error) from error
            if not self._left:
                raise
            what = str(error)
        loss.detach_()  # Lightning holds it, and with it all that the failed pass had kept
        while True:
            self._give_way(what)
            try:
                self._again()
                return
            except torch.OutOfMemoryError as error:
                what = str(error)

    def close(self) -> Tensor:
        """[loss, tokens] float64 of the whole window, which ends here."""
        alone = len(self._sums) == 1
        total, self.since = (self._sums[0], self._summed_up) if alone else (torch.stack(self._sums).sum(0), None)
        self._sums.clear()
        self._kept = []
        self._left = max(0, self._left - 1)
        return total

    def _summed(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss = self._loss(batch)
        tokens = batch["loss_tokens"].to(loss.device)
        self._sums.append(torch.stack((loss.detach().double(), tokens.double())))
        if loss.is_cuda:
            self._summed_up = torch.cuda.Event()
            self._summed_up.record()
        return loss

    def _weight(self, loss: Tensor, tokens: Tensor) -> Tensor | None:
        """What the backward of ``loss`` begins with; ``tokens`` are those of its whole micro-batch, not of a part."""
        # All on the device, which the host does not wait for.
        return tokens.to(loss.device).clamp(min=1).reciprocal().to(loss.dtype) if self.means else None

    def _run(self, batches: Iterable[Mapping[str, Tensor]], tokens: Tensor) -> None:
        for batch in batches:
            with self._context():
                loss = self._summed(batch)
            (loss / self._scale()).backward(self._weight(loss, tokens))

    def _again(self) -> None:
        for parameter in self._parameters():
            parameter.grad = None
        self._sums.clear()
        for micro in self._kept:
            micro.rewind()
            self._run(micro.parts(self._parts), micro.batch["loss_tokens"])

    def _give_way(self, what: str) -> None:
        before = self._now()
        rows = max(micro.rows for micro in self._kept)  # any of them may be the one that did not fit
        if not self._recompute.lower(OUT_OF_MEMORY):
            if self._parts >= rows:
                raise ModelError(
                    _short(before, what),
                    rule="recomputation is at its lowest level, and a micro-batch of one row cannot be divided",
                    fix="a smaller data.max_length",
                )
            self._parts = min(2 * self._parts, rows)
        forget_inputs()
        forget_outputs()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(f"out of memory with recompute {before}: going on with {self._now()}")

    def _among_others(self, error: torch.OutOfMemoryError) -> ModelError:
        rows = "a smaller data.batch_size, with more of trainer.accumulate_grad_batches for the same global batch"
        lower = {"none": "full", "selective": "full", "full": "offload"}.get(self._recompute.level)
        return ModelError(
            _short(self._now(), str(error)),
            rule="one process of several cannot run again: the others wait for its gradients",
            fix=f"run.recompute={lower}, or {rows}" if lower else rows,
        )

    def _now(self) -> str:
        return self._recompute.name + (f", micro-batches in {self._parts} parts" if self._parts > 1 else "")


def _short(now: str, what: str) -> str:
    return f"out of memory with recompute {now}: {' '.join(what.split())[:200]}"
