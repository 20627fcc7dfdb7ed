"""Errors a user can act on: what is wrong, where, by which rule, and the way out."""

from __future__ import annotations

from collections.abc import Sequence


class QtrainError(Exception):
    """One mistake of the input, told in one message; the command line prints it and exits with 2.

    Args:
        what: the fact, with the offending value: ``optimizer.lr='fast' is not a number``.
        where: file, line, key or layer it was found in.
        rule: what is required there.
        fix: the way out, as something that can be typed where there is such a thing.
    """

    def __init__(self, what: str, *, where: str | None = None, rule: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.rule, self.fix = what, where, rule, fix
        super().__init__(self.message())

    def message(self) -> str:
        """The whole text, a line for each part that is known."""
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.rule:
            lines.append(f"  rule: {self.rule}")
        if self.fix:
            lines.append(f"  try:  {self.fix}")
        return "\n".join(lines)


class ConfigError(QtrainError):
    """A key, a value or a recipe that the schema does not take."""


class DataError(QtrainError):
    """A file, a sample or a data set that cannot be trained on."""


class ModelError(QtrainError):
    """A model, a tokenizer or a layer that is missing or does not fit."""


class CheckpointError(QtrainError):
    """A checkpoint or a run directory that cannot be read or must not be overwritten."""


class StorageError(QtrainError):
    """A disk that is full, or a directory that cannot be written."""


class ExportError(QtrainError):
    """A model that the chosen format cannot hold."""


class ErrorList(ConfigError):
    """Several mistakes found at once, each printed whole."""

    def __init__(self, errors: Sequence[QtrainError]) -> None:
        self.errors = list(errors)
        QtrainError.__init__(self, "\n".join(error.message() for error in self.errors))
