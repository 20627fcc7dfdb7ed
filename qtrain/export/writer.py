"""What a format's implementation is: one function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from qtrain.modules.deployed import DeployedModel, DeployedTensor
from qtrain.ptq.activation_stats import Calibration

Progress = Callable[[Iterable[DeployedTensor], int], Iterator[DeployedTensor]]


class Writer(Protocol):
    """Writes a whole directory, or leaves the old one as it was.

    Called with the model, the format's options and the directory; and by name ``tokenizer``; ``facts`` of the training
    for the model card (``qtrain.export.card``); ``calibration``, the live model and text, for formats that ask for it;
    ``progress``, which wraps the loop over tensors, given their number; ``resume``, a key of all that decides what is
    written, with which an interrupted call is gone on with (``qtrain.export.partial``). Returns the facts for
    export.json.
    """

    def __call__(
        self,
        model: DeployedModel,
        options: Any,
        directory: Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        facts: Mapping[str, Any],
        calibration: Calibration | None = None,
        progress: Progress | None = None,
        resume: str | None = None,
    ) -> dict[str, Any]: ...
