"""Every file that evaluation and training read may be gzipped, and is refused by its kind if it is no text."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.runs import read_run
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation.calibration import read_judged
from kalm_integrations.training.config import CollectionConfig
from kalm_integrations.training.sources import read_training_set

BEIR = {"queries.jsonl": '{"_id": "q", "text": "x?"}\n', "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq\tp\t1\n"}


def read_corpus(path: Path) -> Collection:
    (path.parent / "qrels").mkdir(exist_ok=True)
    for name, content in BEIR.items():
        (path.parent / name).write_text(content)
    return Collection.read(path.parent)


def read_training(path: Path) -> list[list[str]]:
    texts = read_training_set(CollectionConfig(path=path, name="data"))
    return [[query.text, *texts.passages] for query in texts.queries]


READERS = [
    (read_run, "a.run", "q Q0 a 1 1.5 t\n"),
    (read_judged, "pairs.jsonl", '{"query": "q", "text": "a", "label": 1}\n'),
    (read_training, "train.jsonl", '{"query": "q", "positives": ["a"], "negatives": ["b"]}\n'),
    (read_corpus, "corpus.jsonl", '{"_id": "p", "text": "naïve"}\n'),
]


@pytest.mark.parametrize(("read", "name", "content"), READERS)
def test_a_gzipped_file_is_read_as_the_plain_one(
    tmp_path: Path, read: Callable[[Path], object], name: str, content: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    plain = read(path)
    assert plain
    path.write_bytes(gzip.compress(content.encode()))
    assert read(path) == plain


@pytest.mark.parametrize(("read", "name", "content"), READERS)
def test_what_is_no_text_is_refused(tmp_path: Path, read: Callable[[Path], object], name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04\x15\x04")
    with pytest.raises(SettingsError, match=rf"{name} must be UTF-8 text, gzipped or not.*, but is a ZIP archive"):
        read(path)
    path.write_bytes(gzip.compress(content.encode())[:-9])
    with pytest.raises(SettingsError, match=rf"{name} must be a whole gzip file, but is damaged"):
        read(path)
