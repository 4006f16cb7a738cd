"""JSON lines from outside: one object per line, bad lines named by their number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from kalm_integrations.errors import KalmError, SettingsError

Row = dict[str, Any]
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


def parse_lines(
    lines: Iterable[bytes],
    source: str,
    parse: Callable[[str], Parsed],
    report: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, Parsed]]:
    """Parse line by line, leaving out blank lines.

    Args:
        lines: UTF-8, with or without line ends.
        source: what to call their origin in messages.
        parse: makes a value of a line's text without its line end; raises `KalmError` for a bad one.
        report: takes the message about a bad line, which is then left out. None stops at the first.

    Yields:
        Each line's number, counted from 1, and its value.

    Raises:
        SettingsError: a line is bad, and there is no `report`.
    """
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            if not text.strip():
                continue
            parsed = parse(text)
        except (KalmError, UnicodeDecodeError) as error:
            reason = f"a line must be UTF-8, but is not ({error})" if isinstance(error, UnicodeDecodeError) else str(error)
            msg = f"{source}:{number}: {reason}"
            if report is None:
                raise SettingsError(msg) from error
            report(msg)
        else:
            yield number, parsed


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
        msg = f"a line must be a JSON object, but it cannot be parsed ({reason})"
        raise SettingsError(msg) from error
    if not isinstance(row, dict):
        msg = f"a line must be a JSON object, but has type {type(row).__name__}"
        raise SettingsError(msg)
    return row


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Return UTF-8 JSON; half surrogates, which JSON knows and UTF-8 does not, are escaped."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace")


def _checked(value: Any, field: str | None) -> str:
    if not isinstance(value, str):
        msg = f"field {field!r} must be a string, but has type {type(value).__name__}"
        raise SettingsError(msg)
    return value
