"""How the demo looks."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 80
"""Columns that the demo needs, and uses at most."""


def heading(console: Console, text: str) -> None:
    """Print a heading with space above."""
    console.print()
    console.print(Text(text, style="bold cyan"))


def plain(console: Console, text: str) -> None:
    """Print a text without reading markup in it."""
    console.print(Text(text))


def columns(*names: str, n_words: int = 1) -> Table:
    """Return an empty table with `n_words` columns of words, and the rest of numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < n_words else "right", no_wrap=True)
    return table


def seconds(duration: float) -> str:
    """Return a duration for people."""
    return f"{duration:.1f} s" if duration >= 1 else f"{1000 * duration:.0f} ms"


def shortened(text: str, width: int) -> Text:
    """Return the beginning of a text."""
    beginning = Text(text)
    beginning.truncate(width, overflow="ellipsis")
    return beginning
