"""What the terminal shows: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(lines: str | Iterable[str], title: str | None = None) -> None:
    """Print lines under a title, an empty line before it."""
    if title:
        out.print(f"\n[bold]{title}[/bold]")
    for line in [lines] if isinstance(lines, str) else lines:
        out.print(line, markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print an aligned table; the first column is text, the others are figures."""
    shown = _grid(title)
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left", header_style="dim", no_wrap=bool(number))
    for row in rows:
        shown.add_row(*row)
    out.print(shown)


def listing(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print names with what they mean: all left-aligned, only the last column wraps."""
    shown = _grid(title, show_header=False)
    for number in range(len(rows[0])):
        shown.add_column(no_wrap=number < len(rows[0]) - 1)
    for row in rows:
        shown.add_row(*row)
    out.print(shown)


def fail(message: str) -> None:
    """Print an error."""
    err.print("[bold red]error[/bold red] ", end="")
    err.print(message, markup=False)


def hush() -> None:
    """Keep libraries from talking over the results; to be called before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # a GGUF file is read behind a bar of its own
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Says at import that an optional kernel is absent, and at each int8 product that it casts to fp16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "torch", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # logs what it raises, and that is told once
    warnings.filterwarnings("ignore", module=r"(lightning|transformers|peft|torch|triton|bitsandbytes|wandb)(\.|$)")


def hush_lightning() -> None:
    """Lightning raises its own log level when it is imported; to be called after that."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _grid(title: str, *, show_header: bool = True) -> Table:
    return Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2),
        show_header=show_header,
    )
