"""With other integrations: ingest, restart, write-back and backfill in document stores, and the stock ranker as an oracle."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from haystack import Document
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.document_stores.types import DuplicatePolicy
from haystack_integrations.components.rankers.sentence_transformers import SentenceTransformersSimilarityRanker
from haystack_integrations.components.retrievers.chroma import ChromaEmbeddingRetriever
from haystack_integrations.document_stores.chroma import ChromaDocumentStore
from haystack_integrations.document_stores.qdrant import QdrantDocumentStore
from tools.haystack_helpers import (
    QUERY,
    STORES,
    TEXTS,
    Backend,
    MakeReranker,
    ask,
    assert_all_stored,
    by_text,
    chroma,
    documents,
    embed,
    encoded,
    indexing_pipeline,
    open_backend,
    query_pipeline,
    question,
)

from haystack_integrations.common.kalm.stores import access_to
from kalm_integrations import KalmReranker
from kalm_integrations.haystack import BackfillReport, KalmDocumentEncoder, KalmRanker, backfill, wait_for_write_back
from kalm_integrations.sentence_transformers import KalmCrossEncoder
from kalm_integrations.testing import FakeReranker


@pytest.fixture(params=STORES)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return open_backend(request, tmp_path, request.param)


@pytest.fixture
def store(backend: Backend) -> Iterator[Any]:
    store = backend.open()
    yield store
    backend.close(store)


def test_ingest_query_restart_query(backend: Backend, make_reranker: MakeReranker) -> None:
    """What the indexing pipeline encoded is read after a restart: zero encodes, the same order and scores."""
    store = backend.open()
    source = Document(
        content="Berlin is large and lies on the Spree. Sarajevo is the capital of Bosnia and lies on the Miljacka."
    )
    indexing = indexing_pipeline(store, make_reranker())
    indexing.run({"splitter": {"documents": [source]}})
    n_parts = store.count_documents()
    assert n_parts > 2
    answers = []
    for _ in range(2):
        reranker = make_reranker()
        ranked = ask(query_pipeline(backend.make_retriever(document_store=store), KalmRanker(model=reranker)))
        assert (reranker.stats.passages_encoded, reranker.stats.metadata_hits) == (0, n_parts)
        assert not any("kalm" in key for document in ranked for key in document.meta)
        answers.append([(document.id, document.score) for document in ranked])
        store = backend.reopen(store)
    backend.close(store)
    assert [document_id for document_id, _ in answers[0]] == [document_id for document_id, _ in answers[1]]
    assert [score for _, score in answers[0]] == pytest.approx([score for _, score in answers[1]], abs=1e-6)
    assert answers[0] == sorted(answers[0], key=lambda answer: -answer[1])


def test_a_long_encoding_survives_unchanged(backend: Backend, make_reranker: MakeReranker) -> None:
    """A string of over 110,000 characters comes back as it was written."""
    store = backend.open()
    reranker = make_reranker(compression_ratio=1, storage_codec="fp32")
    written = encoded(reranker, documents("Lift and drag of a slender wing in a slipstream. " * 40))
    assert len(written[0].meta["kalm_encoding"]) > 110_000
    store.write_documents(written)
    store = backend.reopen(store)
    assert store.filter_documents()[0].meta == written[0].meta
    backend.close(store)


def test_write_back_persists_what_a_query_encoded(backend: Backend, make_reranker: MakeReranker) -> None:
    """The second query, after a restart, encodes nothing; texts, embeddings, ids and other metadata are as they were."""
    store = backend.open()
    store.write_documents(documents(page=1))
    before = by_text(store.filter_documents())
    before = {text: replace(document, meta=dict(document.meta)) for text, document in before.items()}
    reranker = make_reranker()
    ranker = KalmRanker(model=reranker, document_store=store)
    first = ask(query_pipeline(backend.make_retriever(document_store=store), ranker))
    assert wait_for_write_back(10)
    assert reranker.stats.passages_encoded == 3
    assert all(document.meta == {"page": 1} for document in first)

    store = backend.reopen(store)
    after = by_text(store.filter_documents())
    assert all(document.meta.keys() == {"page", "kalm_encoding", "kalm_fp"} for document in after.values())
    assert {text: replace(document, meta={"page": 1}) for text, document in after.items()} == before
    fresh = make_reranker()
    second = ask(query_pipeline(backend.make_retriever(document_store=store), KalmRanker(model=fresh)))
    assert fresh.stats.passages_encoded == 0
    assert [document.id for document in second] == [document.id for document in first]
    backend.close(store)


def test_documents_that_were_handed_out_stay_as_they_are(make_reranker: MakeReranker) -> None:
    """InMemoryDocumentStore hands out the objects that it holds, and holds those that it was given."""
    given = documents(page=1)
    store = InMemoryDocumentStore()
    store.write_documents(given)
    found = store.filter_documents()
    KalmRanker(model=make_reranker(), document_store=store).run(query=QUERY, documents=found)
    assert wait_for_write_back(10)
    assert all(document.meta == {"page": 1} for document in [*given, *found])
    assert_all_stored(store, make_reranker(), TEXTS)


def test_write_back_is_off_by_default(store: Any, make_reranker: MakeReranker) -> None:
    store.write_documents(documents())
    KalmRanker(model=make_reranker()).run(query=QUERY, documents=store.filter_documents())
    assert all(document.meta == {} for document in store.filter_documents())


def test_write_back_fails_no_query(backend: Backend, make_reranker: MakeReranker, caplog: pytest.LogCaptureFixture) -> None:
    """Documents that the store has not, or with another text, are passed over and counted; the others are written."""
    store = backend.open()
    store.write_documents(documents(*TEXTS[:2]))
    ranker = KalmRanker(model=make_reranker(), document_store=store)
    changed = Document(id=documents(TEXTS[1])[0].id, content="as it was retrieved")
    assert len(ranker.run(query=QUERY, documents=[documents()[0], changed, documents()[2]])["documents"]) == 3
    assert wait_for_write_back(10)
    held = by_text(store.filter_documents())
    assert {text: "kalm_fp" in document.meta for text, document in held.items()} == {TEXTS[0]: True, TEXTS[1]: False}
    assert "2 of 3 encodings were not written back: 1 gone, 1 have another text now" in caplog.text
    backend.close(store)


async def test_fifty_concurrent_queries_write_back(
    backend: Backend, make_reranker: MakeReranker, caplog: pytest.LogCaptureFixture
) -> None:
    """Each passage is encoded once, and no encoding that is written gets lost."""
    store = backend.open()
    store.write_documents(documents())
    reranker = make_reranker()
    ranker = KalmRanker(model=reranker, document_store=store)
    found = store.filter_documents()
    # More than a small machine gives: the client of a local Qdrant does not bear them.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(16))
    results = await asyncio.gather(*(ranker.run_async(query=f"query {n}", documents=found) for n in range(50)))
    assert all(len(result["documents"]) == 3 for result in results)
    assert wait_for_write_back(10)
    assert reranker.stats.passages_encoded == 3
    assert not [record for record in caplog.records if record.name.startswith("kalm") and record.levelno >= logging.WARNING]
    assert_all_stored(store, make_reranker(), TEXTS)
    backend.close(store)


@pytest.mark.parametrize("moment", ["write-back", "first look of backfill", "second look of backfill"])
def test_what_others_write_meanwhile_is_not_undone(store: Any, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others change a text, delete a document and change metadata, just after a store has been read."""
    texts = {"changed": "old text", "deleted": "deleted text", "labelled": "labelled text", "alone": "left alone"}
    given = [Document(id=name, content=text, meta={"page": 1}, embedding=embed(text)) for name, text in texts.items()]
    store.write_documents(given)
    embeddings = {document.id: document.embedding for document in store.filter_documents()}
    access = type(access_to(store))
    read, n_reads = access.read, iter(range(1, 9))

    def read_and_change(self: Any, ids: Any) -> Any:
        held = read(self, ids)
        if next(n_reads) == (2 if moment.startswith("second") else 1):
            new = Document(id="changed", content="new text", meta={"page": 2}, embedding=embed("new text"))
            store.write_documents([new], policy=DuplicatePolicy.OVERWRITE)
            store.delete_documents(["deleted"])
            store.update_by_filter({"field": "id", "operator": "==", "value": "labelled"}, {"page": 2})
        return held

    monkeypatch.setattr(access, "read", read_and_change)
    reranker = FakeReranker()
    if moment == "write-back":
        KalmRanker(model=reranker, document_store=store).run(query=QUERY, documents=given)
        assert wait_for_write_back(10)
    else:
        report = backfill(store, KalmDocumentEncoder(model=reranker), progress_bar=False)
        n_seen = 1 if moment.startswith("first") else 0
        assert report == BackfillReport(4, 4, 0, n_gone=n_seen, n_changed=n_seen)
    held = {document.id: document for document in store.filter_documents()}
    assert {name: (document.content, document.meta["page"]) for name, document in held.items()} == {
        "changed": ("new text", 2),
        "labelled": ("labelled text", 2),
        "alone": ("left alone", 1),
    }
    assert {name for name, document in held.items() if "kalm_fp" in document.meta} == {"labelled", "alone"}
    assert held["labelled"].embedding == embeddings["labelled"]


@pytest.mark.parametrize("moment", ["write-back", "backfill"])
def test_metadata_that_others_change_after_every_read_survive(
    store: Any, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is read, by us or by what we call, is not written again."""
    given = documents("text", page=0)
    store.write_documents(given)
    page = 0
    is_other = False

    def changing(read: Callable[..., Any]) -> Callable[..., Any]:
        def read_and_change(*arguments: Any, **settings: Any) -> Any:
            nonlocal page, is_other
            found = read(*arguments, **settings)
            if not is_other:
                is_other, page = True, page + 1
                store.update_by_filter({"field": "id", "operator": "==", "value": given[0].id}, {"page": page})
                is_other = False
            return found

        return read_and_change

    reads = [(store, "filter_documents")]
    if isinstance(store, ChromaDocumentStore):
        reads = [(store._collection, "get")]
    if isinstance(store, QdrantDocumentStore):
        reads = [(store._client, "scroll"), (store._client, "retrieve")]
    for reader, name in reads:
        monkeypatch.setattr(reader, name, changing(getattr(reader, name)))
    if moment == "write-back":
        KalmRanker(model=FakeReranker(), document_store=store).run(query=QUERY, documents=given)
        assert wait_for_write_back(10)
    else:
        backfill(store, KalmDocumentEncoder(model=FakeReranker()), progress_bar=False)
    monkeypatch.undo()
    held = store.filter_documents()[0].meta
    assert (held["page"], "kalm_fp" in held) == (page, True)


class TestPolicies:
    def test_skip_keeps_encodings(self, store: Any, make_reranker: MakeReranker) -> None:
        """Ingesting an unchanged corpus again without the encoder loses nothing under SKIP."""
        store.write_documents(encoded(make_reranker(), documents()))
        store.write_documents(documents(), policy=DuplicatePolicy.SKIP)
        assert_all_stored(store, make_reranker(), TEXTS)

    def test_overwrite_with_the_encoder_keeps_encodings(self, store: Any, make_reranker: MakeReranker) -> None:
        for _ in range(2):
            store.write_documents(encoded(make_reranker(), documents()), policy=DuplicatePolicy.OVERWRITE)
        assert_all_stored(store, make_reranker(), TEXTS)

    def test_overwrite_without_the_encoder_costs_encodes_never_scores(
        self, backend: Backend, make_reranker: MakeReranker
    ) -> None:
        """Most stores lose the encoding; Chroma keeps the old text's, which is found stale. The score is right in both."""
        store = backend.open()
        old = encoded(make_reranker(), documents("old text"))[0]
        store.write_documents([old])
        store.write_documents(
            [Document(id=old.id, content="new text", meta={"page": 2}, embedding=embed("new"))],
            policy=DuplicatePolicy.OVERWRITE,
        )
        found = store.filter_documents()
        keeps_old = isinstance(store, ChromaDocumentStore)
        assert found[0].meta.get("kalm_encoding") == (old.meta["kalm_encoding"] if keeps_old else None)
        reranker = make_reranker()
        ranked = KalmRanker(model=reranker, document_store=store).run(query=QUERY, documents=found)["documents"]
        assert wait_for_write_back(10)
        assert ranked[0].score == make_reranker().score(QUERY, ["new text"])[0]
        assert (reranker.stats.passages_encoded, reranker.stats.stale) == (1, int(keeps_old))
        assert_all_stored(store, make_reranker(), ["new text"])
        backend.close(store)


def test_a_pipeline_from_yaml_reads_encodings_in_a_new_process(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """YAML and the store's folder are all that a new process needs to rank with zero encodes and write nothing."""
    place = chroma(tmp_path)
    store = place.open()
    store.write_documents(encoded(KalmReranker.from_pretrained(tiny_checkpoint), documents()))
    ranker = KalmRanker(model=tiny_checkpoint, document_store=store)
    pipeline = query_pipeline(ChromaEmbeddingRetriever(document_store=store), ranker)
    expected = ask(pipeline)
    (tmp_path / "pipeline.yaml").write_text(pipeline.dumps())
    code = f"""
import json
from pathlib import Path
from haystack import Pipeline
pipeline = Pipeline.loads(Path({str(tmp_path / "pipeline.yaml")!r}).read_text())
ranked = pipeline.run({question(QUERY)!r})["ranker"]["documents"]
n_encoded = pipeline.get_component("ranker").reranker.stats.passages_encoded
print(json.dumps([n_encoded, [d.id for d in ranked]]))
"""
    environment = {**os.environ, "HAYSTACK_TELEMETRY_ENABLED": "false"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == [0, [document.id for document in expected]]


def test_the_stock_ranker_agrees(make_reranker: MakeReranker) -> None:
    """Haystack's own cross-encoder ranker, given our model, selects the same texts, documents, order and scores."""
    given = [
        *documents("Sarajevo", title="Bosnia", rating=0),
        *documents("Berlin", title=None, rating=False),
        *documents("Belgrade", title="Serbia"),
        Document(content=None, meta={"title": "no text"}),
        Document(id="twice", content="first", score=0.1),
        Document(id="twice", content="second", score=0.2),
    ]
    layout = {"meta_fields_to_embed": ["title", "rating", "absent"], "embedding_separator": " - ", "top_k": 4}
    stock = SentenceTransformersSimilarityRanker(**layout)
    stock._cross_encoder = KalmCrossEncoder(make_reranker())
    ranker = KalmRanker(model=make_reranker(), **layout)
    for query in (QUERY, "capital of Serbia"):
        ours, theirs = (r.run(query=query, documents=given)["documents"] for r in (ranker, stock))
        assert [document.id for document in ours] == [document.id for document in theirs]
        assert [document.score for document in ours] == pytest.approx([document.score for document in theirs], abs=1e-6)
