"""What enters one decoder block after the other, for all rows of text: in memory, or in files that survive a stop."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from qtrain.files import atomic_file
from qtrain.modules.block_chain import Chain


class Prefixes:
    """Hidden states of all rows behind the blocks in full precision, and behind the blocks that were placed.

    Args:
        done: number of blocks that are about to be placed from a cache; the model is in full precision still.
    """

    def __init__(self, chain: Chain, dtype: torch.dtype, directory: Path | None, done: int) -> None:
        # What leaves block `done` may have been written before the run was stopped that trained the block on it.
        self._full = Prefix(chain, dtype, directory, "full", latest=done + 1)
        self._quantized = Prefix(chain, dtype, directory, "quantized", latest=done)
        while self._full.position < done:
            self._full.advance()

    def around(self, k: int) -> tuple[Tensor, Tensor]:
        """What enters block k behind the placed blocks, and what leaves it in full precision, as it is still."""
        while self._quantized.position < k:
            self._quantized.advance()
        while self._full.position <= k:
            self._full.advance()
        return self._quantized.states, self._full.states

    def remove(self) -> None:
        """Let go of the files."""
        self._full.remove()
        self._quantized.remove()


class Prefix:
    """Hidden states [rows, L, d] on the way through a chain of blocks, those that enter one block at a time.

    In a directory they are a file ``NAME-K.bin``, mapped to memory: it appears when it is complete, then the one
    before goes. What is held in memory is then one batch.

    Args:
        dtype: in which the states are held.
        directory: None: in memory of the CPU.
        latest: a file of a later block than this one is of no use.

    Attributes:
        position: number of the block that the states enter.
        states: [rows, L, d].
    """

    def __init__(self, chain: Chain, dtype: torch.dtype, directory: Path | None, name: str, latest: int = 0) -> None:
        self._chain, self._dtype, self._directory, self._name = chain, dtype, directory, name
        self.position = 0
        if directory is None:
            self.states = torch.empty(chain.shape, dtype=dtype)
            chain.enter(self.states)
            return
        found = [k for k in range(latest + 1) if self._file(directory, k).is_file()]
        if found:
            self.position = found[-1]
            self.states = self._mapped(self._file(directory, self.position))
        else:
            with atomic_file(self._file(directory, 0)) as temporary:
                self.states = self._mapped(temporary)
                chain.enter(self.states)
        self._tidy(directory)

    def advance(self) -> None:
        """Run the block that the states enter, as it is at the moment."""
        inputs, position = self.states, self.position
        if self._directory is None:
            self._chain.advance(position, inputs, inputs)
        else:
            with atomic_file(self._file(self._directory, position + 1)) as temporary:
                self.states = self._mapped(temporary)
                self._chain.advance(position, inputs, self.states)
        self.position = position + 1
        if self._directory is not None:
            self._tidy(self._directory)

    def remove(self) -> None:
        """Let go of the file."""
        if self._directory is not None:
            self._file(self._directory, self.position).unlink(missing_ok=True)

    def _mapped(self, path: Path) -> Tensor:
        """The content of a file, which is made as large as it has to be."""
        flat = torch.from_file(str(path), shared=True, size=math.prod(self._chain.shape), dtype=self._dtype)
        return flat.view(self._chain.shape)

    def _file(self, directory: Path, k: int) -> Path:
        return directory / f"{self._name}-{k}.bin"

    def _tidy(self, directory: Path) -> None:
        """Let go of other blocks' states, and of what a run that was killed left half written."""
        kept = self._file(directory, self.position)
        for path in [*directory.glob(f"{self._name}-*.bin"), *directory.glob(f".{self._name}-*.tmp")]:
            if path != kept:
                path.unlink(missing_ok=True)
