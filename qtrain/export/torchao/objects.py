"""Python objects as torchao writes them in JSON: enums, dtypes, granularities."""

from __future__ import annotations

from typing import Any


def enum(kind: str, value: str) -> dict[str, str]:
    """A member of an enum, by its class and name."""
    return {"_type": kind, "_data": value}


def torch_dtype(name: str) -> dict[str, str]:
    """A dtype of torch."""
    return {"_type": "torch.dtype", "_data": name}


def versioned(kind: str, version: int = 1, **fields: Any) -> dict[str, Any]:
    """An object of a class that counts its versions."""
    return {"_type": kind, "_version": version, "_data": fields}


def row() -> dict[str, Any]:
    """One scale a row."""
    return versioned("PerRow", dim=-1)
