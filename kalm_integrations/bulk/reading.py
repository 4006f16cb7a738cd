"""Outputs of bulk encoding, read back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kalm_integrations.bulk.arrow import import_pyarrow
from kalm_integrations.bulk.sources import ROWS_PER_BATCH, parquet_files
from kalm_integrations.corpora.jsonl import Row, parse_lines, parse_object
from kalm_integrations.corpora.text import open_lines
from kalm_integrations.errors import SettingsError


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
