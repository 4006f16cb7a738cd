"""Passages in every format of text that is read: JSON lines, a JSON array, CSV, TSV, and plain lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kalm_integrations.core.types import ENCODING_KEY, Passage
from kalm_integrations.corpora.jsonl import (
    Parsed,
    PassageFields,
    Row,
    check_object,
    decode,
    parse_each,
    parse_line,
    parse_object,
    without_mark,
)
from kalm_integrations.corpora.text import name_of, open_lines
from kalm_integrations.errors import SettingsError

MAX_FIELD_CHARS = 2**31 - 1
"""Of a CSV field; the csv module's own limit is 128 Ki, which a long passage or its encoding exceeds."""

Kind: TypeAlias = Literal["lines", "array", "csv", "tsv", "plain"]
Record: TypeAlias = "list[str] | csv.Error"


@dataclass(frozen=True)
class Candidate:
    """A passage, and the row it came in."""

    place: str
    """What messages call it: the input's name and the number."""
    number: int
    """Of the line it begins on, or of the object in a JSON array; from 1."""
    row: Row
    text: str

    @property
    def passage(self) -> Passage:
        """The passage with the encoding that the row has."""
        return Passage(self.text, self.row.get(ENCODING_KEY))


def read_candidates(
    path: Path, fields: PassageFields, report: Callable[[str], None] | None = None, *, takes_plain_lines: bool = False
) -> Iterator[Candidate]:
    """Read passages from a file or standard input, row by row; a JSON array is loaded whole.

    The format is known by the file's name, behind which .gz may follow: .csv and .tsv have a header row, .jsonl and .ndjson
    an object a line. Otherwise it is known by the first characters: JSON begins with a brace, or with a bracket and a brace.

    Args:
        path: file, or - for standard input.
        fields: which fields make a row's passage.
        report: takes the message about a bad row, which is then left out. None stops at the first.
        takes_plain_lines: whether what is named .txt, or does not begin as JSON does, has one passage a line.

    Raises:
        SettingsError: a row is bad and there is no `report`, or the input cannot be read at all.
    """
    with open_lines(path) as all_lines:
        kind, lines = _recognise(path, all_lines, takes_plain_lines=takes_plain_lines)
        read = (PassageFields() if kind == "plain" else fields).read
        for source, number, (row, text) in _parse_rows(kind, lines, name_of(path), lambda row: (row, read(row)), report):
            yield Candidate(f"{source}{number}", number, row, text)


def read_rows(path: Path, parse: Callable[[Row], Parsed]) -> Iterator[Parsed]:
    """Read the rows of a file of JSON lines, a JSON array, CSV or TSV; the format is known as by `read_candidates`.

    Args:
        path: file.
        parse: makes a value of a row; raises `KalmError` for a bad one.

    Raises:
        SettingsError: a row is bad: the message names file and line; or the file cannot be read at all.
    """
    with open_lines(path) as all_lines:
        kind, lines = _recognise(path, all_lines, takes_plain_lines=False)
        for _, _, parsed in _parse_rows(kind, lines, name_of(path), parse, None):
            yield parsed


def _parse_rows(
    kind: Kind,
    lines: Iterator[bytes],
    name: str,
    parse: Callable[[Row], Parsed],
    report: Callable[[str], None] | None,
) -> Iterator[tuple[str, int, Parsed]]:
    """Yield what is before a row's number in messages, the number, and what is made of the row."""
    source = f"{name}, object " if kind == "array" else f"{name}:"
    items, to_row = _split(kind, lines, name)

    def parse_item(item: Any) -> Parsed | None:
        row = to_row(item)
        return None if row is None else parse(row)

    for number, parsed in parse_each(items, source, parse_item, report):
        yield source, number, parsed


def _recognise(path: Path, lines: Iterator[bytes], *, takes_plain_lines: bool) -> tuple[Kind, Iterator[bytes]]:
    """Return an input's format and all its lines."""
    suffix = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return ("csv" if suffix == ".csv" else "tsv"), lines
    if suffix == ".txt" and takes_plain_lines:
        return "plain", lines
    head, start = [], b""
    for line in without_mark(lines):
        head.append(line)
        start += line.strip()
        if len(start) > 1:
            break
    is_json = suffix in (".json", ".jsonl", ".ndjson") or not takes_plain_lines
    # A plain line may begin with a bracket: [1] is a footnote.
    if start.startswith(b"[") and (is_json or start[1:].lstrip().startswith(b"{")):
        return "array", chain(head, lines)
    return ("lines" if is_json or start.startswith(b"{") else "plain"), chain(head, lines)


def _split(kind: Kind, lines: Iterator[bytes], name: str) -> tuple[Iterable[tuple[int, Any]], Callable[[Any], Row | None]]:
    """Return an input's numbered items, and what makes a row of one, or None of a blank one."""
    if kind == "array":
        return enumerate(_load_array(lines, name), 1), lambda value: check_object(value, "it")
    if kind in ("lines", "plain"):
        to_row = _parse_row if kind == "lines" else lambda line: {"text": line}
        return enumerate(without_mark(lines), 1), lambda line: parse_line(line, to_row)
    records = _read_records(lines, "excel" if kind == "csv" else "excel-tab")
    header = [names for _, names in parse_each(islice(records, 1), f"{name}:", _check_header)]
    return records, lambda record: _zip_record(header[0], record)


def _parse_row(line: str) -> Row:
    try:
        return parse_object(line)
    except SettingsError as error:
        if line.lstrip().startswith(("{", "[")):
            raise
        msg = f"{error}; CSV and TSV are known by a file name that ends in .csv or .tsv"
        raise SettingsError(msg) from error


def _load_array(lines: Iterable[bytes], name: str) -> list[Any]:
    try:
        values: list[Any] = json.loads(b"".join(without_mark(lines)))
    except (ValueError, RecursionError) as error:
        msg = f"{name} must be a JSON array of objects, for it begins with a bracket, but cannot be parsed ({error})"
        raise SettingsError(msg) from error
    return values


def _read_records(lines: Iterable[bytes], dialect: str) -> Iterator[tuple[int, Record]]:
    """Split CSV into records that are not blank, each behind the number of its first line; one that is no CSV is its error."""
    csv.field_size_limit(MAX_FIELD_CHARS)
    # What is not UTF-8 must not end the reading: it is told from its record.
    reader = csv.reader((line.decode("utf-8", "surrogateescape") for line in without_mark(lines)), dialect, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, error
        else:
            if record:
                yield number, record


def _check_record(record: Record) -> list[str]:
    if isinstance(record, csv.Error):
        msg = f"a row must be CSV, but it cannot be parsed ({record})"
        raise SettingsError(msg) from record
    decode("".join(record).encode("utf-8", "surrogateescape"))
    return record


def _check_header(record: Record) -> list[str]:
    names = _check_record(record)
    if len(set(names)) < len(names):
        msg = f"the first row must have the names of the fields, each once, but has: {', '.join(map(repr, names))}"
        raise SettingsError(msg)
    return names


def _zip_record(header: list[str], record: Record) -> Row:
    values = _check_record(record)
    if len(values) != len(header):
        msg = f"a row must have the {len(header)} fields of the first row, but has {len(values)}"
        raise SettingsError(msg)
    return dict(zip(header, values, strict=True))
