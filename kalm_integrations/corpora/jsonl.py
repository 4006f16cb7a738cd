"""JSON lines from outside: one object per line, bad lines named by their number."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kalm_integrations.corpora.text import read_lines
from kalm_integrations.errors import KalmError, SettingsError

Row = dict[str, Any]
Item = TypeVar("Item")
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class PassageFields:
    """Which fields of a row make its passage: title and text joined by a space, as BEIR does."""

    text: str = "text"
    title: str | None = "title"
    """None, or a field that a row lacks: the text alone."""

    def read(self, row: Row) -> str:
        """Return the passage of a row.

        Raises:
            SettingsError: the text is missing, or a part is no text.
        """
        if self.text not in row:
            msg = f"a row must have its passage under {self.text!r}, but has the keys: {', '.join(map(repr, row)) or 'none'}"
            raise SettingsError(msg)
        text = _checked(row[self.text], self.text)
        title = row.get(self.title) if self.title is not None else None
        # A text without title stays as it is, spaces included: encodings belong to an exact text.
        return f"{_checked(title, self.title)} {text}".strip() if title else text


def parse_each(
    items: Iterable[tuple[int, Item]],
    source: str,
    parse: Callable[[Item], Parsed | None],
    report: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, Parsed]]:
    """Parse item by item, naming bad ones by their place.

    Args:
        items: each behind its number.
        source: how messages name their origin, up to the number.
        parse: makes a value of an item, or None to leave it out; raises `KalmError` for a bad one.
        report: takes the message about a bad item, which is then left out. None stops at the first.

    Yields:
        Each item's number and its value.

    Raises:
        SettingsError: an item is bad, and there is no `report`.
    """
    for number, item in items:
        try:
            parsed = parse(item)
        except KalmError as error:
            msg = f"{source}{number}: {error}"
            if report is None:
                raise SettingsError(msg) from error
            report(msg)
        else:
            if parsed is not None:
                yield number, parsed


def parse_lines(
    lines: Iterable[bytes],
    source: str,
    parse: Callable[[str], Parsed],
    report: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, Parsed]]:
    """Parse UTF-8 line by line, leaving out blank lines; otherwise as `parse_each`.

    `source` is the input's name, and `parse` is given a line's text without its line end. Numbers count from 1.
    """
    return parse_each(enumerate(without_mark(lines), 1), f"{source}:", lambda line: parse_line(line, parse), report)


def parse_file(path: Path, parse: Callable[[str], Parsed]) -> Iterator[Parsed]:
    """Parse a UTF-8 file, gzipped or not, line by line, leaving out blank lines.

    Raises:
        SettingsError: it is no text, or a line is bad: the message names file and line.
    """
    with path.open("rb") as file:
        for _, parsed in parse_lines(read_lines(file, str(path)), str(path), parse):
            yield parsed


def parse_line(line: bytes, parse: Callable[[str], Parsed]) -> Parsed | None:
    """Parse the text of a line without its line end; None if it is blank.

    Raises:
        SettingsError: it is not UTF-8; and what `parse` raises.
    """
    text = decode(line).rstrip("\r\n")
    return parse(text) if text.strip() else None


def without_mark(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Return lines without the byte order mark that some programs write before UTF-8."""
    for number, line in enumerate(lines):
        yield line if number else line.removeprefix(codecs.BOM_UTF8)


def decode(line: bytes) -> str:
    """Decode UTF-8.

    Raises:
        SettingsError: it is something else.
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        msg = f"a line must be UTF-8, but is not ({error})"
        raise SettingsError(msg) from error


def parse_object(line: str) -> Row:
    """Parse one JSON object.

    Raises:
        SettingsError: it is something else.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        # json's own text speaks of "line 1" of what is some other line of the file.
        reason = f"{error.msg}: character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        # What an object over several lines begins with.
        remedy = "; jq -c . writes each object on a line of its own" if line.strip() == "{" else ""
        msg = f"a line must be a JSON object, but it cannot be parsed ({reason}){remedy}"
        raise SettingsError(msg) from error
    return check_object(row, "a line")


def check_object(value: Any, what: str) -> Row:
    """Return a value of JSON that is an object.

    Raises:
        SettingsError: it is something else.
    """
    if not isinstance(value, dict):
        msg = f"{what} must be a JSON object, but has type {type(value).__name__}"
        raise SettingsError(msg)
    return value


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Return UTF-8 JSON; half surrogates, which JSON knows and UTF-8 does not, are escaped."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace")


def _checked(value: Any, field: str | None) -> str:
    if not isinstance(value, str):
        msg = f"field {field!r} must be a string, but has type {type(value).__name__}"
        raise SettingsError(msg)
    return value
