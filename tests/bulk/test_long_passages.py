"""Corpora with passages that are longer than the limit: in windows or cut, stopped, gone on with, and weighed beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tools.bulk import content

from kalm_integrations import EncodedPassage, KalmReranker, Passage
from kalm_integrations.bulk import BulkReport, Start, encode_corpus, encoding, read_encoded
from kalm_integrations.bulk.state import MANIFEST
from kalm_integrations.core.passages.stores import LmdbPayloadStore
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.errors import EngineError, SettingsError
from kalm_integrations.samples import XQUAD_EN

LIMIT = 96
ROWS_PER_WINDOW = 3
Make = Callable[..., KalmReranker]


@pytest.fixture
def texts() -> list[str]:
    """Short ones, and articles of one to three paragraphs, one of them twice."""
    paragraphs = list(Collection.read(XQUAD_EN).passages.values())
    articles = [" ".join(paragraphs[n : n + 1 + n % 3]) for n in range(6)]
    return [text for article in articles for text in (article, article[:90])] + articles[:1]


@pytest.fixture
def make(make_reranker: Make) -> Make:
    def make(**settings: Any) -> KalmReranker:
        return make_reranker(max_passage_tokens=LIMIT, storage_codec="rot4", cache_bytes=0, **settings)

    return make


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encoding, "ROWS_PER_WINDOW", ROWS_PER_WINDOW)
    rows = [{"_id": str(number), "text": text} for number, text in enumerate(texts)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), "in.parquet")


def _stop(source: str, output: str, reranker: KalmReranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a run whose model fails when something has been written."""
    encode = reranker.encode_to_metadata
    n_calls = 0

    def fail(given: list[str]) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            msg = "the model fails"
            raise EngineError(msg)
        return encode(given)

    monkeypatch.setattr(reranker, "encode_to_metadata", fail)
    with pytest.raises(EngineError):
        encode_corpus(source, output, reranker)


def _check(output: str, texts: list[str], reranker: KalmReranker) -> None:
    rows = list(read_encoded(output))
    assert [row["text"] for row in rows] == texts
    reading = reranker.read([Passage(row["text"], row["kalm_encoding"]) for row in rows])
    assert list(reading) == ["stored"] * len(texts)
    fingerprints = [EncodedPassage.from_metadata(row["kalm_encoding"]).fingerprint for row in rows]
    assert [row["kalm_fp"] for row in rows] == fingerprints
    assert set(fingerprints) == set(reranker.fingerprints)


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("source", ["in.jsonl", "in.parquet"])
def test_a_run_that_is_stopped_goes_on(
    make: Make, texts: list[str], source: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row carries the fingerprint of its own encoding, and an article that comes twice is encoded once."""
    Path("whole").mkdir()
    whole = encode_corpus(source, f"whole/{output}", make())
    _stop(source, output, make(), monkeypatch)
    reranker = make()
    report = encode_corpus(source, output, reranker)
    assert 0 < report.resumed_rows < len(texts)
    assert report.resumed_rows % ROWS_PER_WINDOW == 0
    assert content(Path(output)) == content(Path("whole") / output)
    _check(output, texts, reranker)
    for counts in (whole.counts, report.counts):
        assert (counts.encoded, counts.repeated, counts.windowed, counts.truncated) == (12, 1, 6, 0)
    assert reranker.stats.windowed < 6


def test_rows_that_carry_encodings_keep_them_with_their_fingerprint(make: Make, texts: list[str]) -> None:
    encode_corpus("in.jsonl", "out.jsonl", make())
    rows = [{**row, "kalm_fp": "lost"} for row in read_encoded("out.jsonl")]
    Path("again.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = encode_corpus("again.jsonl", "kept.jsonl", make())
    assert (report.counts.passed_through, report.counts.windowed) == (len(texts), 0)
    _check("kept.jsonl", texts, make())
    cut = encode_corpus("again.jsonl", "cut.jsonl", make(long_passages="cut"))
    assert (cut.counts.stale, cut.counts.passed_through, cut.counts.truncated) == (7, 6, 6)
    back = encode_corpus("cut.jsonl", "back.jsonl", make())
    assert (back.counts.stale, back.counts.passed_through, back.counts.windowed) == (7, 6, 6)


def test_a_run_is_not_gone_on_with_in_another_way(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop("in.jsonl", "out.jsonl", make(long_passages="cut"), monkeypatch)
    with pytest.raises(SettingsError, match=r"begun with long_passages='cut', but this run has 'windows'"):
        encode_corpus("in.jsonl", "out.jsonl", make())
    encode_corpus("in.jsonl", "out.jsonl", make(), overwrite=True)
    _stop("in.jsonl", "few.jsonl", make(max_windows=2), monkeypatch)
    with pytest.raises(SettingsError, match="begun with windows_fingerprint="):
        encode_corpus("in.jsonl", "few.jsonl", make())


def test_what_an_earlier_version_began_is_gone_on_with_where_passages_are_cut(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings say nothing of long passages, and its counts nothing of windows."""
    expected = encode_corpus("in.jsonl", "whole.jsonl", make(long_passages="cut"))
    _stop("in.jsonl", "out.jsonl", make(long_passages="cut"), monkeypatch)
    manifest = Path("out.jsonl.partial") / MANIFEST
    begun = json.loads(manifest.read_text())
    for name in ("long_passages", "windows_fingerprint"):
        del begun["settings"][name]
    for name in ("windowed", "truncated"):
        del begun["progress"]["counts"][name]
    manifest.write_text(json.dumps(begun))
    with pytest.raises(SettingsError, match=r"begun with long_passages='cut', but this run has 'windows'"):
        encode_corpus("in.jsonl", "out.jsonl", make())
    report = encode_corpus("in.jsonl", "out.jsonl", make(long_passages="cut"))
    assert report.resumed_rows
    assert report.counts.rows == expected.counts.rows
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_an_output_with_cut_passages_is_not_taken_for_whole(make: Make, texts: list[str], output: str) -> None:
    """Their fingerprint is that of short ones, which are the same in both ways."""

    def encode(source: str, **settings: Any) -> BulkReport:
        return encode_corpus(source, output, make(**settings))

    encode("in.jsonl", long_passages="cut")
    assert encode("in.jsonl", long_passages="cut").was_complete
    with pytest.raises(SettingsError, match="is not these rows with encodings of this model"):
        encode("in.jsonl")
    encode_corpus("in.jsonl", output, make(), overwrite=True)
    assert encode("in.jsonl").was_complete
    with pytest.raises(SettingsError, match="is not these rows with encodings of this model"):
        encode("in.jsonl", long_passages="cut")
    Path("short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if len(text) == 90))
    encode_corpus("short.jsonl", output, make(long_passages="cut"), overwrite=True)
    assert encode("short.jsonl").was_complete


@pytest.mark.parametrize("settings", [{}, {"long_passages": "cut"}, {"max_windows": 2}])
def test_the_size_is_told_beforehand(make: Make, settings: dict[str, Any]) -> None:
    """Within a tenth."""
    started: list[Start] = []
    report = encode_corpus("in.jsonl", "out.jsonl", make(**settings), on_start=started.append)
    assert started[0].estimated_bytes == pytest.approx(report.n_bytes, rel=0.1)


def test_a_payload_store_takes_windows(make: Make, texts: list[str]) -> None:
    """They are found there by text, and what was cut is not taken for it."""
    stores = [LmdbPayloadStore(name) for name in ("cut", "windows")]
    ways: list[dict[str, Any]] = [{"long_passages": "cut"}, {}]
    for store, settings in zip(stores, ways, strict=True):
        reranker = make(payload_store=store, storage_mode="reference", **settings)
        report = encode_corpus("in.jsonl", None, reranker)
        assert report.counts.encoded == report.counts.references == 12
        assert set(make(payload_store=store, **settings).read(texts)) == {"found"}
    found = list(make(payload_store=stores[0]).read(texts))
    assert [status == "found" for status in found] == [len(text) == 90 for text in texts]
