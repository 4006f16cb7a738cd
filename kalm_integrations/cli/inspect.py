"""`kalm inspect`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kalm_integrations.cli import options
from kalm_integrations.cli.terminal import make_table, print_facts, print_json, print_table, report_bad
from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.corpora.jsonl import parse_lines, parse_object
from kalm_integrations.corpora.text import STREAM, name_of, open_lines
from kalm_integrations.errors import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

    from kalm_integrations.core.passages.encoding import EncodedPassage


def inspect(
    value: Annotated[
        str,
        typer.Argument(
            metavar="ENCODING|FILE",
            help="An encoding, or a file (gzipped or not; - for standard input) whose lines are encodings or JSONL rows with "
            "`kalm_encoding`.",
        ),
    ] = str(STREAM),
    payload_store: options.PayloadStore = None,
    skip_bad: options.SkipBad = False,
    as_json: options.Json = False,
) -> None:
    """Show what encodings hold, and their size.

    The size is given for every codec and for every ratio that all of them can be pooled to, in characters of the metadata
    string; of several encodings it is the mean.
    """
    from kalm_integrations.cli.summary import EncodingSummary
    from kalm_integrations.core.passages.encoding import EncodedPassage
    from kalm_integrations.core.passages.stores import LmdbPayloadStore

    folder = options.existing(payload_store)
    store = None if folder is None else LmdbPayloadStore(folder)
    summary = EncodingSummary()

    def parse(line: str) -> tuple[int, EncodedPassage]:
        encoding = _encoding_of(line)
        return len(encoding), EncodedPassage.from_metadata(encoding, store)

    def read(lines: Iterable[bytes], source: str) -> None:
        for _, (length, encoding) in parse_lines(lines, source, parse, report_bad if skip_bad else None):
            summary.add(length, encoding)

    if value.startswith(("kalm1", "{")):
        read([os.fsencode(value)], "argument")
    else:
        with open_lines(Path(value)) as lines:
            read(lines, name_of(Path(value)))
    n = summary.n_encodings
    if not n:
        msg = f"there must be an encoding to inspect, but {name_of(Path(value))} holds none"
        raise SettingsError(msg)
    lengths = summary.lengths()
    if as_json:
        print_json({**summary.facts(), "lengths": lengths})
        return
    means = {
        name: f"{total:,} ({total / n:,.1f} on average)" if n > 1 else f"{total:,}"
        for name, total in (("tokens", summary.n_tokens), ("characters", summary.n_characters))
    }
    facts = summary.facts()
    n_windows = facts.pop("windows")
    if n_windows:
        means["in_windows"] = f"{facts['in_windows']:,}, of {n_windows:,} windows"
    print_facts({**facts, **means})
    if lengths:
        print()
        print_table(_to_table(lengths))


def _encoding_of(line: str) -> str:
    """Return the encoding in a line: the line itself, or a field of a JSON row."""
    if not line.startswith("{"):
        return line.strip()
    encoding = parse_object(line).get(ENCODING_KEY)
    if not isinstance(encoding, str):
        msg = f"a row must have an encoding under {ENCODING_KEY!r}, but this one has none"
        raise SettingsError(msg)
    return encoding


def _to_table(lengths: dict[int, dict[str, float]]) -> Table:
    table = make_table()
    table.add_column("ratio", justify="right")
    for codec in next(iter(lengths.values())):
        table.add_column(codec, justify="right")
    for ratio, by_codec in lengths.items():
        table.add_row(str(ratio), *(f"{length:,.0f}" for length in by_codec.values()))
    return table
