"""Who loads an export here: the program it was written for, or a reader of our own where that is not installed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qtrain.export.bitsandbytes.load import load_beside
from qtrain.models.config import ModelSection
from qtrain.models.load import load_model
from qtrain.models.packed import load_packed
from qtrain.models.quantized.header import read_header
from qtrain.numerics.spec import Convention


@dataclass(frozen=True)
class Consumer:
    """A program that reads a format.

    Attributes:
        name: of it.
        packages: that transformers needs for the format, as they are imported.
        install: the command for them.
        fp32: it computes with the numbers that the training computed with, in fp32.
        rounds_as: whose rounding of inputs with a scale of absmax / 127.5 a token it has.
        multiplies_bytes: quantized inputs meet codes, their scales come after the sum.
    """

    name: str = "transformers"
    packages: tuple[str, ...] = ()
    install: str = ""
    fp32: bool = True
    rounds_as: Convention = "compressed-tensors"
    multiplies_bytes: bool = False

    def breaks_ties_alike(self, conventions: Collection[Convention], bytes_too: bool) -> bool:
        """Whether it finds the codes of inputs that the training found, whose arithmetic was ``bytes_too``.

        With absmax / 127.5 the largest input of each token lies between two codes, and the last bit of a sum decides.
        """
        half = {convention for convention in conventions if convention != "vllm"}
        return not half or (half == {self.rounds_as} and self.multiplies_bytes == bytes_too)

    @property
    def installed(self) -> bool:
        """All of it is here."""
        return all(find_spec(package) for package in self.packages)


CONSUMERS = {
    # GPTQModel's kernels round each weight to 16 bits before the product (7.7).
    "gptq": Consumer(
        "transformers with GPTQModel", ("gptqmodel", "optimum"), "pip install gptqmodel optimum", fp32=False
    ),
    "awq": Consumer("transformers with GPTQModel", ("gptqmodel",), "pip install gptqmodel", fp32=False),
    # torchao multiplies inputs by 1 / scale (0.18).
    "torchao": Consumer(
        "transformers with torchao", ("torchao",), "pip install torchao", rounds_as="torchao", multiplies_bytes=True
    ),
    "bitsandbytes": Consumer("transformers with bitsandbytes and PEFT"),
}
"""Formats that transformers does not read alone, or that what we depend on does not."""
OWN = Consumer("qtrain")


@dataclass(frozen=True)
class Loaded:
    """An export as a model.

    Attributes:
        by: who loaded it.
        note: why not the program that it was written for, and what to do about it.
    """

    model: PreTrainedModel
    by: Consumer
    note: str | None = None


def load_export(
    export_format: str, directory: Path, dtype: torch.dtype, *, device: torch.device | str = "cpu"
) -> Loaded:
    """The model of an export as its consumer loads it; where that cannot be, its codes as qtrain reads them.

    Args:
        dtype: of what is not quantized.

    Raises:
        ModelError: it cannot be loaded.
    """
    consumer = CONSUMERS.get(export_format, Consumer())
    if export_format == "bitsandbytes":
        model, note = load_beside(directory, dtype, device=device)
        return Loaded(model, consumer, note)
    note = _obstacle(export_format, directory, consumer)
    if note is None:
        # GPTQModel greets and reports on standard output, which is for results.
        with redirect_stdout(StringIO()):
            return Loaded(load_model(ModelSection(path=str(directory)), dtype, device=device), consumer)
    return Loaded(load_packed(directory, dtype, device=device), OWN, f"measured by qtrain's own reader: {note}")


def _obstacle(export_format: str, directory: Path, consumer: Consumer) -> str | None:
    """What keeps the consumer from loading this export."""
    if not consumer.installed:
        return f"{consumer.name} is not installed ({consumer.install})"
    if export_format == "gptq" and _mixed(read_header(directory) or {}):
        return "transformers takes one layout for all layers of a GPTQ checkpoint (GPTQModel.load reads each)"
    return None


def _mixed(header: Mapping[str, Any]) -> bool:
    return any(options for options in (header.get("dynamic") or {}).values())
