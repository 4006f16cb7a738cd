"""What the commands say: one-line errors, notes, tables, facts and JSON."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

from kalm_integrations.corpora.jsonl import to_json
from kalm_integrations.errors import KalmError

if TYPE_CHECKING:
    from rich.table import Table


class OneLineErrors(TyperGroup):
    """Prints every error that a user can put right as one line, and exits with code 2."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run, and exit."""
        kwargs["standalone_mode"] = False
        try:
            exit_code = super().main(*args, **kwargs)
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            hint = f" (see '{context.command_path} --help')" if context else ""
            _fail(f"{error.format_message().rstrip('.')}{hint}")
        except OSError as error:
            where = f"{error.filename}: " if error.filename is not None else ""
            _fail(f"{where}{error.strerror or error}")
        except KalmError as error:
            _fail(str(error))
        sys.exit(exit_code or 0)


def _fail(message: str) -> NoReturn:
    note(f"error: {' '.join(message.split())}")
    sys.exit(2)


def prepare() -> None:
    """Make standard output take any text, and show the package's warnings as notes; for a process that is `kalm`."""
    if isinstance(sys.stdout, TextIOWrapper):
        # A terminal that lacks a character shows a question mark. Standard error never fails: it escapes what it lacks.
        sys.stdout.reconfigure(errors="replace")
    logging.getLogger("kalm_integrations").addHandler(_Notes(logging.INFO))
    logging.getLogger("kalm_integrations.core.checkpoint.locate").setLevel(logging.INFO)


class _Notes(logging.Handler):
    """Prints what the package logs as notes, unless a command logs for itself, as `kalm train` does."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            note(record.getMessage())


def note(message: str) -> None:
    """Print a line about what is going on, apart from the results."""
    tqdm = sys.modules.get("tqdm")
    # A progress bar that is being drawn makes room for the line.
    with nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(file=sys.stderr):
        print(f"kalm: {printable(message)}", file=sys.stderr)


def report_bad(message: str) -> None:
    """Say that a bad row is left out."""
    note(f"left out {message}")


def print_json(value: Any) -> None:
    """Print indented UTF-8 JSON, whatever the terminal's encoding."""
    typer.get_binary_stream("stdout").write(to_json(value, indent=2) + b"\n")


def make_table() -> Table:
    """Return an empty table in the look of all commands."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="bold")


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal."""
    from rich.console import Console

    Console(highlight=False).print(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")


def printable(text: str) -> str:
    """Return a text on one line and without control characters, which could take over a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def describe_windows(n_windowed: int, n_truncated: int) -> str:
    """Return how many of the passages that were encoded are in windows, and how many were not read to the end."""
    return f"{n_windowed:,} of them in windows, {n_truncated:,} not read to the end"


def format_bytes(n_bytes: float) -> str:
    """Return a size such as 7.3 MB."""
    size, unit = n_bytes, "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:,.0f} B" if unit == "B" else f"{size:,.1f} {unit}"


def format_seconds(seconds: float) -> str:
    """Return a time such as 4.2 s or 3.1 h."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:,.0f} ms"
