"""AdamW for weights and moments that are kept in bf16."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qtrain.kernels.adamw import AdamWStep, Parts, adamw_all_, stream_keys
from qtrain.training.gradients import unless

SMALLEST_16BIT = 4096
"""Elements from which moments are in 16 bits: as bitsandbytes has it for 8."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class StochasticAdamW(Optimizer):
    """AdamW whose results are computed in fp32 and rounded to bf16 by chance (Zamirai 2020, arXiv 2010.06192).

    Rounded to the nearest number a bf16 weight stays where it is until an update exceeds 0.2 % of it, and a second
    moment that decays by 0.1 % a step (beta2 = 0.999) never decays at all: after 1,000 steps without a gradient it is
    1.0 of what it was, rounded by chance 0.37, as it should be. fp32 parameters with fp32 moments take the steps of
    torch.optim.AdamW.

    The bits of chance are a hash of seed, step, parameter and element, all of which ``state_dict`` has: a run that goes
    on rounds as one that was not cut off, and replicas round alike.

    Args:
        params: groups of fp32 and bf16 parameters.
        moments: dtype of both moments of parameters with 4096 elements or more; smaller ones have them in fp32.
        seed: of the rounding.

    Attributes:
        gradient_factor: fp32 [], by which the next step multiplies each gradient as it reads it; for that step alone.
        found_inf: fp32 []; where it is not 0 the next step leaves all weights and moments as they are.
    """

    gradient_factor: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        moments: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.moments = moments
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; what ``closure`` gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor = unless(self.found_inf, self.gradient_factor)  # after the closure, which may have set them
        self.found_inf = self.gradient_factor = None
        number = -1
        for group in self.param_groups:
            taken: dict[tuple[int, torch.device], list[Parts]] = defaultdict(list)
            for parameter in group["params"]:
                number += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    self._begin(parameter)
                state["step"] += 1
                count = int(state["step"])
                keys = stream_keys(group["seed"], count, number)
                parts = Parts(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], keys)
                taken[count, parameter.device].append(parts)
            options = {key: group[key] for key in ("betas", "eps", "weight_decay")}
            for (count, device), found in taken.items():
                step = AdamWStep.of(count, lr=float(group["lr"]), **options)
                adamw_all_(found, step, None if factor is None else factor.to(device))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; torch's own would cast moments to the dtype of their parameters."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for key in MOMENTS if number in state_dict["state"] else ():
                kept = state_dict["state"][number][key]
                self.state[parameter][key] = kept.to(parameter.device, self._dtype(parameter))

    def _begin(self, parameter: Tensor) -> None:
        # On the CPU: bias corrections are numbers of the host, as torch's AdamW has them there.
        self.state[parameter]["step"] = torch.zeros(())
        for key in MOMENTS:
            self.state[parameter][key] = torch.zeros_like(
                parameter, dtype=self._dtype(parameter), memory_format=torch.contiguous_format
            )

    def _dtype(self, parameter: Tensor) -> torch.dtype:
        return self.moments if parameter.numel() >= SMALLEST_16BIT else torch.float32
