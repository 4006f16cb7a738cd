"""Outputs of bulk encoding, read back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

from kalm_integrations.bulk.arrow import import_pyarrow
from kalm_integrations.bulk.sources import ROWS_PER_BATCH, parquet_files
from kalm_integrations.core.base import Reranker
from kalm_integrations.core.passages.strings import header_of
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Passage
from kalm_integrations.corpora.jsonl import PassageFields, Row, parse_lines, parse_object
from kalm_integrations.corpora.text import open_lines
from kalm_integrations.errors import CorruptEncodingError, SettingsError
from kalm_integrations.hosting.models import fingerprints_of


def read_encoded(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Go through the rows of an output of bulk encoding, in order; memory holds some of them at a time.

    Args:
        path: JSON lines, gzipped or not; a Parquet file; or a folder of Parquet files, whose order is that of their names.

    Raises:
        SettingsError: it is something else, or does not exist.
        MissingExtraError: it is Parquet, and pyarrow is not installed.
    """
    path = Path(path)
    if not path.exists():
        msg = f"the output of bulk encoding must be a file or folder, but {str(path)!r} does not exist"
        raise SettingsError(msg)
    if path.is_dir() or path.suffix.lower() == ".parquet":
        for file in parquet_files(path):
            with import_pyarrow().parquet.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(ROWS_PER_BATCH):
                    yield from batch.to_pylist()
        return
    with open_lines(path) as lines:
        for _, row in parse_lines(lines, str(path), parse_object):
            yield row


def are_encoded(path: Path, texts: Iterable[str], reranker: Reranker, fields: PassageFields) -> bool:
    """Return whether an output has the rows of passages, in order, each with an encoding of a reranker, by its fingerprint.

    Args:
        path: of the output.
        texts: the passages.
        reranker: made the encodings.
        fields: which fields of a row make its passage.

    Raises:
        SettingsError: it is no output of bulk encoding.
    """
    whole, *of_windows = fingerprints_of(reranker)
    longest, n_tokens = None, 0
    for text, row in zip_longest(texts, read_encoded(path)):
        is_known = row is not None and row.get(FINGERPRINT_KEY) in (whole, *of_windows)
        if text is None or row is None or not is_known or fields.read(row) != text:
            return False
        if of_windows and row[FINGERPRINT_KEY] == whole:
            value = row.get(ENCODING_KEY)
            n_of_row = _n_tokens(value)
            if n_of_row > n_tokens:
                longest, n_tokens = Passage(text, value), n_of_row
    # A passage that was cut has the fingerprint of short ones, but more tokens than any of them.
    return longest is None or list(reranker.read([longest])) == ["stored"]


def _n_tokens(value: object) -> int:
    """Return the number of tokens that an encoding's header tells."""
    try:
        n_tokens: int = header_of(str(value))["n"]
    except CorruptEncodingError:
        return 0
    return n_tokens
