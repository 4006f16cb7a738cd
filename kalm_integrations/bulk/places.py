"""Where an output may lie, and what grows there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kalm_integrations.bulk.outputs import FileOutput, JsonLinesOutput, ParquetOutput
from kalm_integrations.bulk.sources import Source
from kalm_integrations.bulk.state import WorkFolder
from kalm_integrations.corpora.text import STREAM
from kalm_integrations.errors import SettingsError

_PART = re.compile(r"part-\d{5,}\.parquet")


def file_output(folder: WorkFolder, schema: Any) -> FileOutput:
    """Return the output that grows in a folder, by the name of its target; `schema` is that of its rows, if it is known."""
    if folder.target.suffix == ".parquet":
        return ParquetOutput(folder.target, folder.path, schema)
    return JsonLinesOutput(folder.target, folder.path)


def check_place(path: Path, corpus: Source) -> None:
    """Check that an output can lie where it is to lie.

    Raises:
        SettingsError: it cannot.
    """
    is_parquet = path.suffix == ".parquet"
    if not path.resolve().parent.is_dir():
        msg = f"the output must be in an existing folder, but got {str(path)!r}: there is no folder {str(path.parent)!r}"
    elif path.suffix in (".csv", ".tsv"):
        msg = f"the output is JSON lines or Parquet and must not be named {path.suffix}, but got {str(path)!r}; name it .jsonl"
    elif path.is_dir() and not is_parquet:
        msg = f"the output must be a file, or a folder named .parquet, but got {str(path)!r}: it is a folder"
    elif path.is_file() and is_parquet:
        msg = f"an output named .parquet is a folder of files, but {str(path)!r} is a file; name another"
    elif is_parquet and is_same(corpus.path, path):
        msg = f"an output named .parquet must not be the input, but both are {str(path)!r}; name another"
    elif path.is_dir() and any(not _PART.fullmatch(each.name) for each in path.iterdir()):
        msg = f"an output named .parquet must not be a folder with other files, but {str(path)!r} has some; name another"
    else:
        return
    raise SettingsError(msg)


def is_same(source: Path, target: Path) -> bool:
    """Return whether two paths are one file or folder."""
    return source != STREAM and source.exists() and target.exists() and source.samefile(target)


def n_bytes_of(path: Path) -> int:
    """Return the bytes of a file, or of a folder's files."""
    return path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.iterdir())
