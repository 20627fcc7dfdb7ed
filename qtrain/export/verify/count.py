"""How many numbers of a kind differ between an export and its run, and where the first ones are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtrain.errors import ExportError

KINDS = ("codes", "scales", "zero points")


@dataclass
class Count:
    """Numbers of one kind over all layers.

    Attributes:
        compared: how many there are in the run.
        differing: how many are other ones in the export.
        first: the first layer that has some, and what they are there.
        layers: how many layers have some.
    """

    compared: int = 0
    differing: int = 0
    first: tuple[str, str] | None = None
    layers: int = 0

    def add(self, name: str, found: Tensor, own: Tensor) -> None:
        """Count where two tensors of numbers differ; another shape counts whole."""
        self.compared += own.numel()
        if found.shape != own.shape:
            differing = own.numel()
            example = f"shape {list(found.shape)} there, {list(own.shape)} in the run"
        elif found.dtype == own.dtype and torch.equal(_bytes(found), _bytes(own)):
            differing = 0  # of 45 million codes two copies in fp64 would be 0.7 GB
        else:
            same_kind = found.dtype == own.dtype
            wrong = _bytes(found) != _bytes(own) if same_kind else found.double() != own.double()
            differing = int(wrong.sum())
            if differing:
                at = tuple(wrong.nonzero()[0].tolist())
                example = f"at {list(at)} {found[at].item():g} there, {own[at].item():g} in the run"
        if differing:
            self.differing += differing
            self.layers += 1
            self.first = self.first or (name, example)

    def problems(self, kind: str) -> Iterator[ExportError]:
        """One error where any differ."""
        if self.first is not None:
            name, example = self.first
            more = f", {self.layers} layers in all" if self.layers > 1 else ""
            yield ExportError(
                f"{self.differing:,} of {self.compared:,} {kind} differ, first {example}{more}",
                where=name,
                rule=f"an export holds the {kind} of the last training step",
            )


def _bytes(numbers: Tensor) -> Tensor:
    """fp8 by its bytes, for two of them are zero; everything else as it is."""
    return numbers.view(torch.uint8) if numbers.is_floating_point() and numbers.element_size() == 1 else numbers


def counted(counts: Mapping[str, Count]) -> dict[str, dict[str, int]]:
    """The counts, as verify.json holds them."""
    return {kind: {"compared": count.compared, "differing": count.differing} for kind, count in counts.items()}
