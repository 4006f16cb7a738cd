"""Lines of text files, gzipped or not; what is no text is refused by its kind."""

from __future__ import annotations

import gzip
import logging
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import BinaryIO, cast

from kalm_integrations.errors import SettingsError

logger = logging.getLogger(__name__)

STREAM = Path("-")
"""Standard input or output, where a path is asked for."""

FORMATS = " (JSON lines, a JSON array, CSV, TSV or plain lines)"

UNREADABLE = {
    b"PAR1": "Parquet",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xff\xfe": "UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)",
    b"\xfe\xff": "UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)",
}
"""How files begin that are refused, and what they are."""


def name_of(path: Path) -> str:
    """Return what to call an input in a message."""
    return "standard input" if path == STREAM else str(path)


@contextmanager
def open_lines(path: Path) -> Iterator[Iterator[bytes]]:
    """Open a file or standard input as lines of text, unzipped if it is gzip.

    The lines raise `SettingsError` where it is no text, or damaged.
    """
    if path != STREAM:
        with path.open("rb") as file:
            yield read_lines(file, name_of(path), FORMATS)
        return
    if sys.stdin.isatty():
        logger.warning("reading from the terminal, a line at a time; Ctrl-D ends the input")
    stream: BinaryIO = sys.stdin.buffer
    file = stream if isinstance(stream, BufferedReader) else BufferedReader(cast("RawIOBase", stream))
    yield read_lines(file, name_of(path), FORMATS)


def read_lines(file: BufferedReader, name: str, formats: str = "") -> Iterator[bytes]:
    """Read lines, unzipped if they are gzip.

    Args:
        file: opened for bytes.
        name: what messages call it.
        formats: what may be in it, for messages: in brackets, behind a space.

    Raises:
        SettingsError: it is no text, or damaged gzip.
    """
    text: BufferedReader | gzip.GzipFile = file
    try:
        if file.peek(2).startswith(b"\x1f\x8b"):
            text = gzip.GzipFile(fileobj=file)
        _check_text(text.peek(512)[:512], name, formats)
        yield from text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        msg = f"{name} must be a whole gzip file, but is damaged ({error})"
        raise SettingsError(msg) from error


def _check_text(head: bytes, name: str, formats: str) -> None:
    kinds = [kind for magic, kind in UNREADABLE.items() if head.startswith(magic)]
    if kinds or b"\0" in head:
        kind = kinds[0] if kinds else "binary, or UTF-16"
        msg = f"{name} must be UTF-8 text, gzipped or not{formats}, but is {kind}"
        raise SettingsError(msg)
