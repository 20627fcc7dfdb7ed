"""bitsandbytes' optimizers, with 8-bit AdamW of all parameters in one launch and no waits between the others.

bitsandbytes (0.50) launches a kernel for each parameter, waits for it, and asks the driver to fetch its pages. A 7B
Llama with adapters on all layers has 448 parameters, of 15 us each where their bytes take 1.4 (an H200). States are
bitsandbytes' own and so are state dicts.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast
from unittest import mock
from weakref import ref

import bitsandbytes as bnb
import torch
from bitsandbytes.optim import optimizer as upstream
from torch import Tensor
from torch.optim import Optimizer

from qtrain.kernels import adamw8
from qtrain.kernels.adamw8 import AdamW8Step, Maps, Parts
from qtrain.training.gradients import gradients_of, scale_, unless

log = logging.getLogger(__name__)
ROOM = 0.1
"""Share of the GPU's memory that is free where no pages have to be fetched."""
STATES = ("state1", "state2", "absmax1", "absmax2")
MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""In a parameter's state, and in the optimizer."""


class _Together:
    """Parameters that were updated in one launch, with what must be as it was for another one."""

    def __init__(self, gindex: int, found: Sequence[tuple[dict[str, Any], Parts]]) -> None:
        self.gindex, self.count = gindex, len(found)
        # Only looked at: moved to the host after training, states are to be gone from the GPU.
        self._known = [
            (parts.weight, parts.weight.data_ptr(), state, [(name, ref(state[name])) for name in STATES])
            for state, parts in found
        ]
        self._tensors = adamw8.Tensors([parts for _, parts in found])

    def gradients(self, states: Mapping[Tensor, dict[str, Any]]) -> list[Tensor] | None:
        """Of all of them by now; None where anything else is there than was."""
        found = []
        for weight, place, state, parts in self._known:
            gradient = weight.grad
            same = weight.data_ptr() == place and states[weight] is state
            if gradient is None or gradient.dtype != weight.dtype or not same or not adamw8.readable(gradient):
                return None
            if any(state[name] is not part() for name, part in parts):
                return None
            found.append(gradient)
        return found

    def step_(self, gradients: Sequence[Tensor], group: Mapping[str, Any], maps: Maps, factor: Tensor | None) -> None:
        """The update of all, whose counts go on."""
        step = self._known[0][2]["step"] + 1
        for _, _, state, _ in self._known:
            state["step"] = step
        rates = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        self._tensors.step_(gradients, AdamW8Step.of(step, **rates), maps, factor)


class _OneLaunch:
    """Parameters that the kernel knows are put down as bitsandbytes comes by, and updated together at the end.

    Where those were all, they are not come by again as long as everything lies where it did: 448 times 20 us of the
    host.

    Kernels of one stream run in order, on paged states too: the host goes on, and waits where it reads managed memory
    itself, in ``state_dict``. bitsandbytes' kernels run on the default stream: on another one its waits stay.

    Attributes:
        gradient_factor: fp32 [], by which the next step multiplies each gradient; for that step alone.
        found_inf: fp32 []; where it is not 0 the next step leaves all weights and states as they are.
    """

    gradient_factor: Tensor | None = None
    found_inf: Tensor | None = None
    _roomy = False
    _device: torch.device | None = None
    _found: dict[tuple[int, int, torch.dtype], list[tuple[dict[str, Any], Parts]]] | None = None
    _together: Sequence[_Together] = ()
    _maps: Maps | None = None
    _left: Counter[str] = Counter()
    _said = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; what ``closure`` gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor, stop = self.gradient_factor, self.found_inf  # after the closure, which may have set them
        self.gradient_factor = self.found_inf = None
        self._roomy = _has_room()
        try:
            # bitsandbytes' own kernels are told no such thing: before them it is waited for.
            if not self._again(unless(stop, factor)) and (stop is None or not stop):
                self._one_by_one(factor)
        finally:
            self._roomy = False
        if torch.cuda.is_available() and torch.cuda.current_stream() != torch.cuda.default_stream():
            torch.cuda.current_stream().synchronize()  # gradients may be let go on the stream that made them
        return loss

    def _again(self, factor: Tensor | None) -> bool:
        """Whether everything was as it was, and is updated."""
        groups, count = self.param_groups, sum(one.count for one in self._together)  # type: ignore[attr-defined]
        all_known = count and count == sum(len(group["params"]) for group in groups)
        if not (self._roomy and all_known and self._plain()):
            return False
        found = [one.gradients(self.state) for one in self._together]  # type: ignore[attr-defined]
        gradients = [own for own in found if own is not None]
        if len(gradients) < len(found):
            return False
        assert self._maps is not None
        for one, own in zip(self._together, gradients, strict=True):
            one.step_(own, groups[one.gindex], self._maps, factor)
        return True

    def _one_by_one(self, factor: Tensor | None) -> None:
        waits, self._device = not hasattr(upstream, "sync_gpu"), torch.device("cpu")
        if torch.cuda.is_available():
            self._device = torch.device("cuda", torch.cuda.current_device())
            waits = waits or torch.cuda.current_stream() != torch.cuda.default_stream()
        if factor is not None:
            scale_(gradients_of(cast(Optimizer, self)), factor)
        self._found, self._left = defaultdict(list) if self._plain() else None, Counter()
        try:
            with nullcontext() if waits else mock.patch.object(upstream, "sync_gpu", lambda tensor: None):
                super().step()  # type: ignore[misc]
            self._launch()
            self._say_left()
        finally:
            self._found = None

    def prefetch_state(self, p: Tensor) -> None:
        """Bring pages of a parameter's state to the GPU, where they may have left it."""
        if not self._roomy:
            super().prefetch_state(p)  # type: ignore[misc]

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Put one parameter down for the launch, or leave its update to bitsandbytes."""
        state, gradient = self.state[p], p.grad  # type: ignore[attr-defined]
        if self._found is not None and gradient is not None and p.device == self._device and "qmap1" in state:
            parts = Parts(p, gradient, *(state[name] for name in STATES))
            why = adamw8.unfit(parts) or (None if self._shares_maps(p, state) else "codes of another meaning")
            if why is None:
                self._found[gindex, state["step"], p.dtype].append((state, parts))
                return
            self._left[why] += why != adamw8.ELSEWHERE  # of all, and said before (``detour_words``)
        super().update_step(group, p, gindex, pindex)  # type: ignore[misc]

    def _plain(self) -> bool:
        """Whether states are of 8 bits, and nothing is asked of single parameters."""
        own: Any = self
        return bool(own.name2qmap) and not (own.mng.index2config or own.mng.pid2config or own.args.skip_zeros)

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
        together = []
        for (gindex, _, _), found in (self._found or {}).items():
            one, other = (self.name2qmap[name] for name in MAPS.values())  # type: ignore[attr-defined]
            if self._maps is None or self._maps.values1 is not one or self._maps.values2 is not other:
                self._maps = Maps.of(one, other)
            together.append(_Together(gindex, found))
            gradients = [parts.gradient for _, parts in found]
            together[-1].step_(gradients, self.param_groups[gindex], self._maps, None)  # type: ignore[attr-defined]
        self._together = together

    def _say_left(self) -> None:
        """Once, that some of the parameters of 8 bits are updated one by one."""
        left, together = sum(self._left.values()), sum(map(len, (self._found or {}).values()))
        if self._said or not left:
            return
        self._said = True
        reasons = "; ".join(f"{count} {why}" for why, count in (+self._left).items())
        log.info(
            "bitsandbytes updates %d of %d parameters with 8-bit states one by one: %s", left, left + together, reasons
        )

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


def _has_room() -> bool:
    """Whether pages of states stay where they are."""
    if not torch.cuda.is_available():
        return True
    free, whole = torch.cuda.mem_get_info()
    return free > ROOM * whole


def detour_words(name: str, device: torch.device) -> str:
    """``, launched ...`` where bitsandbytes updates parameters of 8 bits on a GPU one by one; else nothing."""
    if "adamw_8bit" not in name or device.type != "cuda" or adamw8.has_kernel():
        return ""
    return ", launched by bitsandbytes for each parameter: Triton is not installed"
