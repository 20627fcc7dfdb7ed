"""What an exported directory says it holds, by its own files alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from qtrain.export.verify.kv_cache import StoredCache
from qtrain.models.quantized.layer import QuantizedLayer
from qtrain.registry import Registry


@dataclass(frozen=True)
class Stored:
    """Headers were read and checked against one another; codes and tensors are read when they are asked for.

    Attributes:
        layers: linears in codes, by module name.
        others: plain tensors by their names.
        claimed: linears that a consumer takes for quantized by the header, whatever the files hold.
        surplus: names of tensors that belong to a layer and not to its format.
        tells_symmetry: the header says which layers are symmetric; else all have zero points.
        own_dtypes: plain tensors have the dtypes that the format prescribes, not that of the checkpoint.
        cache: ranges of keys and values, where the format has a place for any.
    """

    layers: Mapping[str, QuantizedLayer]
    others: Mapping[str, Callable[[], Tensor]]
    claimed: Collection[str]
    surplus: Collection[str] = ()
    tells_symmetry: bool = True
    own_dtypes: bool = False
    cache: StoredCache | None = None


Reader = Callable[[Path, Mapping[str, nn.Linear]], Stored]
"""Called with the directory and the linears of the run's architecture, which lie on the meta device.

Raises:
    QtrainError: the directory contradicts itself, or those linears.
"""

READERS: Registry[Reader] = Registry(
    "format that is read back",
    {
        "compressed-tensors": "qtrain.export.verify.compressed_tensors:read",
        "gptq": "qtrain.export.verify.gptq:read",
        "awq": "qtrain.export.verify.awq:read",
        "torchao": "qtrain.export.verify.torchao:read",
        "merged": "qtrain.export.verify.plain:read",
    },
)
