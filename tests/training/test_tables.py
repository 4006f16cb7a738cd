"""Training data in tables: Parquet and folders of Hugging Face datasets; and in text files that are no JSON lines."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from tools.training_data import PASSAGES, QUERIES

from kalm_integrations.errors import MissingExtraError, SettingsError
from kalm_integrations.training.config import CollectionConfig
from kalm_integrations.training.sources import Query, TrainingSet, read_training_set

ROWS = [
    {"anchor": QUERIES[0], "positive": PASSAGES[0], "negative": PASSAGES[3]},
    {"anchor": QUERIES[1], "positive": PASSAGES[1], "negative": PASSAGES[3]},
    {"anchor": QUERIES[0], "positive": PASSAGES[2], "negative": PASSAGES[1]},
]
EXPECTED = [Query(QUERIES[0], None, (0, 3), (1, 2)), Query(QUERIES[1], None, (2,), (1,))]


def read(path: Path, **settings: Any) -> TrainingSet:
    return read_training_set(CollectionConfig(path=path, **settings))


def triplets() -> Dataset:
    return Dataset.from_list(ROWS)


def to_csv(folder: Path, name: str, delimiter: str) -> Path:
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def to_array(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1))
    return path


def to_parquet(folder: Path) -> Path:
    path = folder / "rows [1].parquet"  # brackets are no pattern
    triplets().to_parquet(path)
    return path


def to_parquet_with_another_name(folder: Path) -> Path:
    return to_parquet(folder).rename(folder / "rows")


def to_dataset(folder: Path) -> Path:
    triplets().save_to_disk(folder / "dataset")
    return folder / "dataset"


def to_splits(folder: Path) -> Path:
    DatasetDict(train=triplets(), test=triplets().select([0])).save_to_disk(folder / "splits")
    return folder / "splits"


def to_files_of_splits(folder: Path) -> Path:
    """As a repository on the hub."""
    repository = folder / "repository"
    (repository / "data").mkdir(parents=True)
    for i in range(3):
        triplets().select([i]).to_parquet(repository / "data" / f"train-0000{i}-of-00003.parquet")
    triplets().select([0]).to_parquet(repository / "data" / "test-00000-of-00001.parquet")
    return repository


FORMATS = [
    lambda folder: to_csv(folder, "rows.csv", ","),
    lambda folder: to_csv(folder, "rows.tsv", "\t"),
    to_array,
    to_parquet,
    to_parquet_with_another_name,
    to_dataset,
    to_splits,
    to_files_of_splits,
]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_holds_the_same(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """Columns are the same in all, and so is what is made of them."""
    texts = read(write(tmp_path))
    assert texts.queries == EXPECTED
    assert texts.passages == [PASSAGES[i] for i in (0, 3, 1, 2)]


@pytest.mark.parametrize("write", [to_splits, to_files_of_splits])
def test_a_split_is_named(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path)
    assert read(path, split="test").queries == [Query(QUERIES[0], None, (0,), (1,))]
    with pytest.raises(SettingsError, match=r"cannot load the split 'dev' of .*train.*test"):
        read(path, split="dev")


def test_a_table_s_lists_labels_and_nulls(tmp_path: Path) -> None:
    lists = Dataset.from_list([{"query": "q", "pos": ["a"], "neg": ["b"]}, {"query": "r", "pos": ["b"], "neg": None}])
    lists.to_parquet(tmp_path / "lists.parquet")
    assert read(tmp_path / "lists.parquet").queries == [Query("q", None, (0,), (1,)), Query("r", None, (1,))]
    labelled = Dataset.from_dict({"query": ["q", "q"], "passage": ["a", "b"], "label": [1, 0]})
    labelled.cast_column("label", ClassLabel(names=["no", "yes"])).save_to_disk(tmp_path / "labelled")
    assert read(tmp_path / "labelled").queries == [Query("q", None, (0,), (1,))]


def test_columns_that_no_layout_uses_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    triplets().add_column("id", [1, 2, 3]).add_column("type", list("abc")).to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet").queries == EXPECTED
    assert caplog.records[0].getMessage().endswith("same query: 1; columns left out: id, type")


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    Dataset.from_dict({"query": ["q", "q"], "passage": ["a", "b"], "label": [1, 5]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(SettingsError, match=r"rows.parquet, row 2: a label must be 0 or 1, but is 5"):
        read(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("query,passage,label\nq,a,1\nq,b,5\n")
    with pytest.raises(SettingsError, match=r"rows.csv:3: a label must be 0 or 1, but is '5'"):
        read(tmp_path / "rows.csv")


def test_what_datasets_cannot_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty").mkdir()
    for name in ("bad.parquet", "empty"):
        with pytest.raises(SettingsError, match=rf"training data must be a BEIR folder, .* cannot load the split .*{name}: "):
            read(tmp_path / name)


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = to_parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "kalm-integrations\[train\]"'):
        read(path)
    assert read(to_array(tmp_path)).queries == EXPECTED
