"""BEIR folders are read as BEIR does, and what is wrong with one is named."""

from __future__ import annotations

import logging
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from kalm_integrations.corpora.beir import FROM_TREC, Collection
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
        (
            (CORPUS, '\n{"_id": 1.0, "text": "x"}', ""),
            r"queries.jsonl:2: a line must have a string or .* as '_id', but has 1.0",
        ),
        ((CORPUS, '{"_id": true, "text": "x"}', ""), r"queries.jsonl:1: a line must have a string or .* but has True"),
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


def test_ids_may_be_whole_numbers(tmp_path: Path) -> None:
    corpus, queries = ('{"_id": 12, "text": "x"}', '{"_id": 7, "text": "x?"}')
    read = Collection.read(write_beir(tmp_path, corpus, queries, "7\t12\t1\n"))
    assert (read.passages, read.queries, read.qrels) == ({"12": "x"}, {"7": "x?"}, {"7": {"12": 1}})


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    folder = write_beir(tmp_path, CORPUS, QUERIES, "q\tp\t2\n")
    path = folder / "qrels" / "test.tsv"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert Collection.read(folder).qrels == {"q": {"p": 2}}


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("q\tp\t1\n", r"but begins with a judgement; write that line above it"),
        ("q 0 p 1\n", r"but has TREC's four columns; this converts them: awk"),
        ("query\tpassage\tgrade\nq\tp\t1\n", r"begins with 'query', 'passage', 'grade'; name the columns so"),
    ],
)
def test_qrels_without_their_header_are_named(tmp_path: Path, qrels: str, message: str) -> None:
    folder = write_beir(tmp_path, CORPUS, QUERIES, "")
    (folder / "qrels" / "test.tsv").write_text(qrels)
    with pytest.raises(SettingsError, match=rf"test.tsv must begin with a line of query-id, corpus-id, score, .*{message}"):
        Collection.read(folder)


def test_the_remedy_for_qrels_of_trec_works(tmp_path: Path) -> None:
    folder = write_beir(tmp_path, CORPUS, QUERIES, "")
    path = folder / "qrels" / "test.tsv"
    path.write_text("q 0 p 1\nq 0 r 0\n")
    converted = subprocess.run(f"{FROM_TREC} {path}", shell=True, capture_output=True, text=True, check=True).stdout
    path.write_text(converted)
    assert Collection.read(folder).qrels == {"q": {"p": 1, "r": 0}}


def test_what_is_odd_is_counted_and_said_in_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a repeated judgement the highest grade counts; nothing is left out, so that runs and measures still fit."""
    corpus = CORPUS + '{"_id": "blank", "text": " "}\n{"_id": "r", "text": "z"}\n'
    queries = QUERIES + '{"_id": "empty", "text": ""}\n{"_id": "unjudged", "text": ""}\n'
    qrels = "q\tp\t2\nq\tp\t1\nq\tgone\t1\nempty\tblank\t1\nnobody\tp\t1\n"
    folder = write_beir(tmp_path, corpus, queries, qrels)
    expected = {
        "repeated judgements": 1,
        "repeated passage ids, of which the last counts": 1,
        "judged queries missing from queries.jsonl": 1,
        "judged passages missing from corpus.jsonl": 1,
        "blank queries": 1,
        "blank passages": 1,
    }
    with caplog.at_level(logging.WARNING):
        read = Collection.read(folder)
    line = "; ".join(f"{what}: {n}" for what, n in expected.items())
    assert [record.getMessage() for record in caplog.records] == [f"{folder / 'qrels' / 'test.tsv'}: {line}"]
    assert read.qrels == {"q": {"p": 2, "gone": 1}, "empty": {"blank": 1}, "nobody": {"p": 1}}
    assert (set(read.queries), read.passages["r"], "blank" in read.passages) == ({"q", "empty"}, "z", True)

    caplog.clear()
    oddities: Counter[str] = Counter()
    assert Collection.read(folder, oddities=oddities) == read
    assert ({what: n for what, n in oddities.items() if n}, caplog.records) == (expected, [])


def test_nothing_is_said_of_a_sound_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Collection.read(write_beir(tmp_path, CORPUS, QUERIES, "q\tp\t2\nq\tr\t0\n"))
    assert caplog.records == []
