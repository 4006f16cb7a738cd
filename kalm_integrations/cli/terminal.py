"""What the command line's commands share: options, one-line errors, reading and writing files and streams, tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NoReturn, cast

import typer
from typer.core import TyperGroup

from kalm_integrations.corpora.jsonl import to_json
from kalm_integrations.errors import KalmError

if TYPE_CHECKING:
    from rich.table import Table

    from kalm_integrations.core.reranker import KalmReranker

STREAM = Path("-")
"""Standard input or output, where a path is asked for."""

ModelOption = Annotated[
    str,
    typer.Option(
        help="nano, small, large, nano-r2, small-r2, large-r2, a hub id or a local folder; pico is built in and small, for "
        "trying things out."
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub repository.", show_default="the alias's")
]
DeviceOption = Annotated[str | None, typer.Option(help="A torch device, such as cpu or cuda:0.", show_default="CUDA if any")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32 or bfloat16.", show_default="bfloat16 on CUDA, float32 elsewhere")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class OneLineErrors(TyperGroup):
    """Prints every error that a user can mend as one line, and exits with code 2."""

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


def note(message: str) -> None:
    """Print a line about what is going on, apart from the results."""
    typer.echo(f"kalm: {printable(message)}", err=True)


@contextmanager
def open_input(path: Path) -> Iterator[BinaryIO]:
    """Open a file or standard input."""
    if path != STREAM:
        with path.open("rb") as file:
            yield file
        return
    if sys.stdin.isatty():
        note("reading from the terminal, a line at a time; Ctrl-D ends the input")
    yield typer.get_binary_stream("stdin")


@contextmanager
def open_output(path: Path) -> Iterator[BinaryIO]:
    """Open a file or standard output; a file appears, or is replaced, when all of it has been written."""
    if path == STREAM:
        yield typer.get_binary_stream("stdout")
        return
    target = path.resolve()
    if target.exists() and not target.is_file():
        # A pipe or a device, which must not be replaced.
        with target.open("wb") as file:
            yield file
        return
    part = target.with_name(f"{target.name}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def name_of(path: Path) -> str:
    """Return what to call an input in a message."""
    return "standard input" if path == STREAM else str(path)


def holds_json(path: Path, lines: Iterator[bytes]) -> tuple[bool, Iterator[bytes]]:
    """Return whether an input holds JSON lines, by its name or else by its first character, and all its lines."""
    if path.suffix in (".jsonl", ".ndjson", ".txt"):
        return path.suffix != ".txt", lines
    head = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    return bool(head) and head[-1].lstrip(b"\xef\xbb\xbf \t").startswith(b"{"), chain(head, lines)


def print_json(value: Any) -> None:
    """Print indented UTF-8 JSON."""
    typer.get_binary_stream("stdout").write(to_json(value, indent=2) + b"\n")


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal."""
    from rich.console import Console

    Console(highlight=False).print(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {value}")


def printable(text: str) -> str:
    """Return a text on one line and without control characters, which could take over a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def parse_list(text: str, name: str) -> list[str]:
    """Return the parts of a comma-separated option.

    Raises:
        BadParameter: there are none.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        msg = "must be a list such as a,b, but is empty"
        raise typer.BadParameter(msg, param_hint=name)
    return parts


def parse_numbers(text: str, name: str) -> list[int]:
    """Return the positive whole numbers of a comma-separated option.

    Raises:
        BadParameter: a part is something else, or there are none.
    """
    parts = parse_list(text, name)
    for part in parts:
        if not part.isascii() or not part.isdigit() or int(part) < 1:
            msg = f"must be positive whole numbers such as 1,2,4, but got {part!r}"
            raise typer.BadParameter(msg, param_hint=name)
    return [int(part) for part in parts]


def open_reranker(model: str, **settings: Any) -> KalmReranker:
    """Open a checkpoint; says so if it is the small built-in one."""
    from kalm_integrations.hosting import as_reranker

    # A name always becomes the real reranker, whatever else the function takes.
    return cast("KalmReranker", as_reranker(model, **settings))
