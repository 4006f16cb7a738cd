"""BEIR folders are read as BEIR does, and what is wrong with one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from kalm_integrations.corpora.beir import Collection
from kalm_integrations.errors import SettingsError


def write_beir(folder: Path, corpus: str, queries: str, qrels: str) -> Path:
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    (folder / "queries.jsonl").write_text(queries, encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}", encoding="utf-8")
    return folder


CORPUS, QUERIES = '{"_id": "p", "title": "T", "text": "x"}\n{"_id": "r", "text": "y"}\n', '{"_id": "q", "text": "x?"}\n'


def test_collection_joins_titles_and_keeps_judged_queries(tmp_path: Path) -> None:
    queries = QUERIES + '{"_id": "other", "title": "no", "text": "z"}\n'
    read = Collection.read(write_beir(tmp_path, CORPUS, queries, "q\tp\t2\n"))
    assert read == Collection(tmp_path.name, {"p": "T x", "r": "y"}, {"q": "x?"}, {"q": {"p": 2}})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((CORPUS + "{", QUERIES, ""), r"corpus.jsonl:3: a line must be a JSON object"),
        ((CORPUS, '\n{"_id": 1, "text": "x"}', ""), r"queries.jsonl:2: a line must have a string as '_id', but has 1"),
        ((CORPUS, '{"_id": "q"}', ""), r"queries.jsonl:1: a row must have its passage under 'text'"),
        ((CORPUS, QUERIES, "q\tp\t1\nq\tp\n"), r"test.tsv:3: a line must be query-id, corpus-id and a whole score"),
        ((CORPUS, QUERIES, "q\tp\thigh\n"), r"test.tsv:2: a line must be"),
    ],
)
def test_collection_names_the_malformed_line(tmp_path: Path, files: tuple[str, str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Collection.read(write_beir(tmp_path, *files))


def test_collection_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"a BEIR folder must hold corpus\.jsonl"):
        Collection.read(tmp_path)
    with pytest.raises(SettingsError, match=r"split 'dev' must be a file in .*, but it has: test"):
        Collection.read(write_beir(tmp_path, CORPUS, QUERIES, ""), "dev")
