"""Tables of training data: Parquet files and Hugging Face datasets, read by `datasets`."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kalm_integrations.corpora.jsonl import Row
from kalm_integrations.errors import MissingExtraError, SettingsError


def is_table(path: Path) -> bool:
    """Return whether a file or folder that is there is for `read_table`."""
    if path.is_dir():
        return not any((path / name).exists() for name in ("corpus.jsonl", "queries.jsonl", "qrels"))
    with path.open("rb") as file:
        return path.suffix.lower() == ".parquet" or file.read(4) == b"PAR1"


def read_table(path: Path, split: str) -> Iterator[tuple[int, Row]]:
    """Read rows, each behind its number, which counts from 1.

    Args:
        path: a Parquet file; a folder that `save_to_disk` wrote; or any other folder that `datasets` can load: its data files
            are sorted into splits by their names, as those of a repository on the hub are.
        split: of a folder that has several.

    Raises:
        MissingExtraError: datasets is not installed.
        SettingsError: there is no such split, or the files cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        msg = (
            f"Parquet files and folders of datasets need the library datasets, which is not installed, to read {path}; "
            'install it with: pip install "kalm-integrations[train]"'
        )
        raise MissingExtraError(msg) from error
    try:
        yield from enumerate(_open(datasets, path, split), 1)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        msg = (
            "training data must be a BEIR folder, a file of JSON lines, a JSON array, CSV, TSV or Parquet, or a folder that "
            f"datasets can load, but it cannot load the split {split!r} of {path}: {error}"
        )
        raise SettingsError(msg) from error


def _open(datasets: Any, path: Path, split: str) -> Any:
    """Return an iterable of rows; nothing is copied to a cache."""
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(str(path), split=split, streaming=True)
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            msg = f"it has the splits: {', '.join(loaded)}"
            raise ValueError(msg)
        loaded = loaded[split]
    return loaded.with_format(None)
