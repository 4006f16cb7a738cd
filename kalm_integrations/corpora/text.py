"""Lines of text files, gzipped or not; what is no text is refused by its kind."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from io import BufferedReader

from kalm_integrations.errors import SettingsError

UNREADABLE = {
    b"PAR1": "Parquet",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xff\xfe": "UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)",
    b"\xfe\xff": "UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)",
}
"""How files begin that are refused, and what they are."""


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
