"""FSDP2: each process holds a share of every weight, and has a layer whole while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

import bitsandbytes as bnb
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from qtrain.modules.token_loss import Loss
from qtrain.training.processes import rank


class ShardedStrategy(ModelParallelStrategy):
    """``trainer.strategy=fsdp2``: Lightning's ModelParallelStrategy, all processes in one group that shards.

    Checkpoints are those of one process: what trains, gathered on rank 0, so that a run goes on under any strategy and
    any number of processes. Lightning's own would gather the frozen base for each of them.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """As for one process."""
        return True

    def setup_environment(self) -> None:
        """Meet the others; data-parallel is every process of every node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains, and buffers, whole and on the CPU of rank 0; all processes have to ask for it."""
        assert self.lightning_module is not None
        return _present((name, whole(value)) for name, value in _kept(self.lightning_module).items())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its share."""
        assert self.lightning_module is not None
        own = _kept(self.lightning_module)
        state = {name: share(value, own[name]) if name in own else value for name, value in _state(checkpoint).items()}
        self.lightning_module.load_state_dict(state, strict=False)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As one process has it, whole and on the CPU of rank 0; all processes have to ask for it."""
        state: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        per_parameter = {
            number: _present((key, whole(value) if isinstance(value, Tensor) else value) for key, value in it.items())
            for number, it in state["state"].items()
        }
        return {**state, "state": per_parameter}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its share."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            per_parameter = {
                number: {key: share(value, parameters[number]) for key, value in moments.items()}
                for number, moments in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": per_parameter})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As every strategy does; weights and optimizer follow when they are asked for."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)


def shard(plain: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Let each process keep its rows of every parameter: of each decoder layer, and of what is around them.

    A layer that runs has its weights whole, as they were: per-row scales are those of the whole weight. Packed codes
    are shared out as the uint8 and int32 that they are, and no dtype is changed on the way; stored as bf16, codes that
    read as NaN were reported to come back as another NaN (bitsandbytes #1945).

    Args:
        plain: the transformers model.
        mesh: of one dimension.
    """
    for layer in plain.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.quant_state = cast(
                bnb.nn.Params4bit, layer.weight
            ).quant_state  # a share has no attributes; bitsandbytes looks here then
    with _integers_without_gradients():
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(plain, mesh=mesh)


class _Nn:
    """torch.nn whose parameters of integers ask for no gradient."""

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)

    @staticmethod
    def Parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:  # noqa: N802  # a class in torch.nn
        return nn.Parameter(data, requires_grad and data.is_floating_point())


@contextmanager
def _integers_without_gradients() -> Iterator[None]:
    """Before 2.13 torch lets each share ask for a gradient first, which codes cannot, and corrects that."""
    if torch.__version__ >= (2, 13):  # type: ignore[operator]  # a TorchVersion
        yield
        return
    place = import_module("torch.distributed.fsdp._fully_shard._fsdp_param")
    place.nn = _Nn()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        place.nn = nn  # type: ignore[attr-defined]


def as_forward(plain: nn.Module, name: str, loss: Loss) -> Loss:
    """``loss`` as a method of the sharded model, before which its own weights (embedding, norm, head) are gathered."""
    setattr(plain, name, loss)
    register_fsdp_forward_method(plain, name)
    found: Loss = getattr(plain, name)
    return found


def unshard(model: nn.Module) -> None:
    """Give each process all of it again, to be saved and no longer to be run; all of them have to call it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what ran last is still gathered
    gathered: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in gathered:
                    gathered[id(parameter)] = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                module._parameters[name] = gathered[id(parameter)]


def whole(tensor: Tensor) -> Tensor | None:
    """The tensor that this is a share of, on the CPU of rank 0; every process has to ask for it, the others get None.

    As many copies in host memory as there are processes would be 12 bytes a trained weight each.
    """
    tensor = tensor.detach()
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return None if rank() else found.cpu()


def share(tensor: Any, like: Tensor) -> Any:
    """This process' share of a whole tensor that ``like`` is a share of; anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def local(tensor: Tensor) -> Tensor:
    """What of it lies here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _present(items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    return {key: value for key, value in items if value is not None}


def _kept(module: nn.Module) -> dict[str, Tensor]:
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    lasting = module.state_dict(keep_vars=True).keys()
    return parameters | {name: buffer for name, buffer in module.named_buffers() if name in lasting}


def _state(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    found: Mapping[str, Tensor] = checkpoint["state_dict"]
    return found
