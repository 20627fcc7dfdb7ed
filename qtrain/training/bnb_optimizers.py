"""bitsandbytes' optimizers, with 8-bit AdamW of all parameters in one launch and no waits between the others.

bitsandbytes (0.50) launches a kernel for each parameter, waits for it, and asks the driver to fetch its pages. A 7B
Llama with adapters on all layers has 448 parameters, of 15 us each where their bytes take 1.4 (an H200). States are
bitsandbytes' own and so are state dicts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from bitsandbytes.optim import optimizer as upstream
from torch import Tensor

from qtrain.kernels import adamw8
from qtrain.kernels.adamw8 import AdamW8Step, Maps, Parts

ROOM = 0.1
"""Share of the GPU's memory that is free where no pages have to be fetched."""
MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""In a parameter's state, and in the optimizer."""


class _OneLaunch:
    """Parameters that the kernel knows are put down as bitsandbytes comes by, and updated together at the end.

    Kernels of one stream run in order, on paged states too: the host goes on, and waits where it reads managed memory
    itself, in ``state_dict``. bitsandbytes' kernels run on the default stream: on another one its waits stay.
    """

    _roomy = False
    _device: torch.device | None = None
    _found: dict[tuple[int, int, torch.dtype], list[Parts]] | None = None
    _maps: Maps | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; what ``closure`` gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        waits, self._device = not hasattr(upstream, "sync_gpu"), torch.device("cpu")
        if torch.cuda.is_available():
            free, whole = torch.cuda.mem_get_info()
            self._roomy, self._device = free > ROOM * whole, torch.device("cuda", torch.cuda.current_device())
            waits = waits or torch.cuda.current_stream() != torch.cuda.default_stream()
        self._found = defaultdict(list) if self._plain() else None
        try:
            with nullcontext() if waits else mock.patch.object(upstream, "sync_gpu", lambda tensor: None):
                super().step()  # type: ignore[misc]
            self._launch()
        finally:
            self._roomy, self._found = False, None
        return loss

    def prefetch_state(self, p: Tensor) -> None:
        """Bring pages of a parameter's state to the GPU, where they may have left it."""
        if not self._roomy:
            super().prefetch_state(p)  # type: ignore[misc]

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Put one parameter down for the launch, or leave its update to bitsandbytes."""
        state, gradient = self.state[p], p.grad  # type: ignore[attr-defined]
        if self._found is not None and gradient is not None and p.device == self._device and "qmap1" in state:
            parts = Parts(p, gradient, *(state[name] for name in ("state1", "state2", "absmax1", "absmax2")))
            if adamw8.fits(parts) and self._shares_maps(p, state):
                state["step"] += 1
                self._found[gindex, state["step"], p.dtype].append(parts)
                return
        super().update_step(group, p, gindex, pindex)  # type: ignore[misc]

    def _plain(self) -> bool:
        """Whether states are of 8 bits, and nothing is asked of single parameters."""
        own: Any = self
        overridden = own.mng.index2config or own.mng.pid2config or own.mng.module_weight_config_triple
        return bool(own.name2qmap) and not overridden and not own.args.skip_zeros

    def _shares_maps(self, p: Tensor, state: dict[str, Any]) -> bool:
        """Whether codes mean what they do in all states. Those of a checkpoint have maps of their own, till now."""
        own: dict[str, Tensor] = self.name2qmap  # type: ignore[attr-defined]
        for key, name in MAPS.items():
            if state[key] is not own[name]:
                own[name] = own[name].to(p.device)
                if not torch.equal(own[name], state[key]):
                    return False
                state[key] = own[name]
        return True

    def _launch(self) -> None:
        for (gindex, step, _), found in (self._found or {}).items():
            one, other = (self.name2qmap[name] for name in MAPS.values())  # type: ignore[attr-defined]
            if self._maps is None or self._maps.values1 is not one or self._maps.values2 is not other:
                self._maps = Maps.of(one, other)
            group = self.param_groups[gindex]  # type: ignore[attr-defined]
            numbers = AdamW8Step.of(step, **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})
            adamw8.adamw8_(found, numbers, self._maps)

    def state_dict(self) -> dict[str, Any]:
        """After what was launched."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        return found


class AdamW8bit(_OneLaunch, bnb.optim.AdamW8bit):
    """States of 8 bits."""


class PagedAdamW8bit(_OneLaunch, bnb.optim.PagedAdamW8bit):
    """The same, which move to the host's memory where the GPU's does not suffice."""


class PagedAdamW32bit(_OneLaunch, bnb.optim.PagedAdamW32bit):
    """States of 32 bits, paged."""


def detour_words(name: str, device: torch.device) -> str:
    """``, launched ...`` where bitsandbytes updates parameters of 8 bits on a GPU one by one; else nothing."""
    if "adamw_8bit" not in name or device.type != "cuda" or adamw8.has_kernel():
        return ""
    return ", launched by bitsandbytes for each parameter: Triton is not installed"
