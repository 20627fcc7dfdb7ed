"""bitsandbytes' optimizers without their wait for the GPU after each parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from bitsandbytes.optim import optimizer as upstream


class _OneAfterTheOther:
    """A step that only launches: kernels of one stream run in order, paged states too.

    bitsandbytes (0.50) waits for the device behind every parameter, so that the host's time of an update, 0.1 ms, is
    the GPU's idle time: 45 of 480 ms a step for the 448 factors of a 7B Llama (an H200). Waited for is where the host
    reads managed memory: in ``state_dict``.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; what ``closure`` gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not hasattr(upstream, "sync_gpu"):  # another version's own affair
            super().step()  # type: ignore[misc]
            return loss
        with mock.patch.object(upstream, "sync_gpu", lambda tensor: None):
            super().step()  # type: ignore[misc]
        return loss

    def state_dict(self) -> dict[str, Any]:
        """After what was launched."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        return found


class AdamW8bit(_OneAfterTheOther, bnb.optim.AdamW8bit):
    """States of 8 bits."""


class PagedAdamW8bit(_OneAfterTheOther, bnb.optim.PagedAdamW8bit):
    """The same, which move to the host's memory where the GPU's does not suffice."""


class PagedAdamW32bit(_OneAfterTheOther, bnb.optim.PagedAdamW32bit):
    """States of 32 bits, paged."""
