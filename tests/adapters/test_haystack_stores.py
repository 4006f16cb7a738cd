"""With other integrations: ingest, restart, write-back and backfill in document stores, and the stock ranker as an oracle."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from haystack import Document, Pipeline, component
from haystack.components.preprocessors import DocumentSplitter
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.document_stores.types import DuplicatePolicy
from haystack.utils import Secret
from haystack_integrations.components.rankers.sentence_transformers import SentenceTransformersSimilarityRanker
from haystack_integrations.components.retrievers.chroma import ChromaEmbeddingRetriever
from haystack_integrations.components.retrievers.pgvector import PgvectorEmbeddingRetriever
from haystack_integrations.components.retrievers.qdrant import QdrantEmbeddingRetriever
from haystack_integrations.document_stores.chroma import ChromaDocumentStore
from haystack_integrations.document_stores.pgvector import PgvectorDocumentStore
from haystack_integrations.document_stores.qdrant import QdrantDocumentStore

from haystack_integrations.common.kalm.stores import access_to
from kalm_integrations import KalmReranker
from kalm_integrations.errors import SettingsError
from kalm_integrations.haystack import BackfillReport, KalmDocumentEncoder, KalmRanker, backfill, wait_for_write_back
from kalm_integrations.sentence_transformers import KalmCrossEncoder
from kalm_integrations.testing import FakeReranker

QUERY = "capital of Bosnia"
TEXTS = ["Berlin is large", "Belgrade lies on the Danube", "Sarajevo is the capital of Bosnia"]
DIMENSION = 8

MakeReranker = Callable[..., KalmReranker]


def embed(text: str) -> list[float]:
    vector = [1.0] * DIMENSION
    for word in text.lower().split():
        vector[sum(word.encode()) % DIMENSION] += 1
    return vector


@component
class WordEmbedder:
    """Stands for the embedding model of an indexing pipeline."""

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        return {"documents": [replace(d, embedding=embed(d.content)) for d in documents]}


@dataclass
class Backend:
    """A store that survives its process."""

    open: Callable[[], Any]
    """Opens it, as a new process would."""
    close: Callable[[Any], None]
    make_retriever: Callable[..., Any]

    def reopen(self, store: Any) -> Any:
        self.close(store)
        return self.open()


class AnyStore(InMemoryDocumentStore):
    """Stands for a store of which nothing is known but the methods that it must have."""


def in_memory(folder: Path, kind: type[InMemoryDocumentStore] = InMemoryDocumentStore) -> Backend:
    path = str(folder / "store.json")

    def open_store() -> InMemoryDocumentStore:
        return kind.load_from_disk(path) if Path(path).exists() else kind(embedding_similarity_function="cosine")

    return Backend(open_store, lambda store: store.save_to_disk(path), InMemoryEmbeddingRetriever)


def chroma(folder: Path) -> Backend:
    def open_store() -> ChromaDocumentStore:
        return ChromaDocumentStore(persist_path=str(folder / "chroma"), client_settings={"anonymized_telemetry": False})

    return Backend(open_store, lambda store: store.close(), ChromaEmbeddingRetriever)


def qdrant(folder: Path) -> Backend:
    def open_store() -> QdrantDocumentStore:
        return QdrantDocumentStore(
            path=str(folder / "qdrant"),
            embedding_dim=DIMENSION,
            return_embedding=True,
            progress_bar=False,
        )

    return Backend(open_store, lambda store: store.close(), QdrantEmbeddingRetriever)


def pgvector(uri: str) -> Backend:
    name = f"haystack_{uuid.uuid4().hex}"

    def open_store() -> PgvectorDocumentStore:
        return PgvectorDocumentStore(
            connection_string=Secret.from_token(uri),
            table_name=name,
            # An index belongs to the schema: a second table needs a name of its own.
            keyword_index_name=f"{name}_keywords",
            embedding_dimension=DIMENSION,
        )

    return Backend(open_store, lambda store: store.close(), PgvectorEmbeddingRetriever)


@pytest.fixture(params=["in_memory", "chroma", "qdrant", "pgvector", "any"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    if request.param == "pgvector":
        return pgvector(request.getfixturevalue("postgres_uri"))
    if request.param == "any":
        return in_memory(tmp_path, AnyStore)
    return {"in_memory": in_memory, "chroma": chroma, "qdrant": qdrant}[request.param](tmp_path)


@pytest.fixture
def store(backend: Backend) -> Iterator[Any]:
    store = backend.open()
    yield store
    backend.close(store)


def documents(*texts: str, **meta: object) -> list[Document]:
    return [Document(content=text, meta=dict(meta), embedding=embed(text)) for text in texts or TEXTS]


def encoded(reranker: object, given: list[Document]) -> list[Document]:
    return KalmDocumentEncoder(model=reranker, progress_bar=False).run(given)["documents"]


def indexing_pipeline(store: Any, reranker: object) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("splitter", DocumentSplitter(split_by="word", split_length=6))
    pipeline.add_component("embedder", WordEmbedder())
    pipeline.add_component("encoder", KalmDocumentEncoder(model=reranker, progress_bar=False))
    pipeline.add_component("writer", DocumentWriter(store, policy=DuplicatePolicy.OVERWRITE))
    pipeline.connect("splitter", "embedder")
    pipeline.connect("embedder", "encoder")
    pipeline.connect("encoder", "writer")
    return pipeline


def query_pipeline(retriever: Any, ranker: KalmRanker) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("retriever", retriever)
    pipeline.add_component("ranker", ranker)
    pipeline.connect("retriever", "ranker.documents")
    return pipeline


def ask(pipeline: Pipeline, query: str = QUERY) -> list[Document]:
    return pipeline.run(question(query))["ranker"]["documents"]


def question(query: str) -> dict[str, Any]:
    return {"retriever": {"query_embedding": embed(query)}, "ranker": {"query": query}}


def by_text(found: list[Document]) -> dict[str, Document]:
    return {document.content: document for document in found}


def assert_all_stored(store: Any, reranker: KalmReranker, texts: list[str]) -> None:
    """Each text is in the store, and a ranker that must not encode can rank it."""
    found = store.filter_documents()
    assert sorted(document.content for document in found) == sorted(texts)
    KalmRanker(model=reranker, on_missing="error").run(query=QUERY, documents=found)
    assert reranker.stats.passages_encoded == 0
    assert {document.meta["kalm_fp"] for document in found} == {reranker.fingerprint}


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


class TestBackfill:
    def test_missing_and_stale_documents_are_encoded(
        self, store: Any, make_reranker: MakeReranker, other_checkpoint: Path
    ) -> None:
        """A second run has nothing to do; who believes `kalm_fp` fetches only documents without the current one."""
        missing, stale, current = documents("missing"), documents("stale"), documents("current")
        stale = encoded(make_reranker(other_checkpoint), stale)
        store.write_documents([*missing, *stale, *encoded(make_reranker(), current)])
        encoder = KalmDocumentEncoder(model=make_reranker(), progress_bar=False)
        believing = {"check_texts": False, "progress_bar": False}
        assert backfill(store, encoder, **believing) == BackfillReport(n_checked=2, n_missing=1, n_stale=1)
        assert backfill(store, encoder, **believing) == BackfillReport(0, 0, 0)
        assert backfill(store, encoder, progress_bar=False) == BackfillReport(3, 0, 0)
        assert_all_stored(store, make_reranker(), ["missing", "stale", "current"])

    def test_filters_restrict_the_work(self, store: Any, make_reranker: MakeReranker) -> None:
        store.write_documents([*documents("a", language="en"), *documents("b", language="de")])
        encoder = KalmDocumentEncoder(model=make_reranker(), progress_bar=False)
        english = {"field": "meta.language", "operator": "==", "value": "en"}
        assert backfill(store, encoder, filters=english, progress_bar=False).n_missing == 1
        assert backfill(store, encoder, filters=english, progress_bar=False).n_checked == 1
        assert backfill(store, encoder, filters=english, check_texts=False, progress_bar=False).n_checked == 0
        assert "kalm_fp" not in by_text(store.filter_documents())["b"].meta

    def test_metadata_that_claim_too_much_are_found(self, store: Any, make_reranker: MakeReranker) -> None:
        """The current fingerprint beside an encoding of another text, or beside none, unless it is to be believed."""
        stale = [replace(document, content="new text") for document in encoded(make_reranker(), documents("old text"))]
        bare = documents("bare", kalm_fp=make_reranker().fingerprint)
        store.write_documents([*stale, *bare, *encoded(make_reranker(), documents("valid"))])
        encoder = KalmDocumentEncoder(model=make_reranker(), progress_bar=False)
        assert backfill(store, encoder, check_texts=False, progress_bar=False).n_checked == 0
        assert backfill(store, encoder, progress_bar=False) == BackfillReport(n_checked=3, n_missing=1, n_stale=1)
        assert_all_stored(store, make_reranker(), ["new text", "bare", "valid"])

    def test_documents_without_content_are_encoded(self, store: Any) -> None:
        """Their passage is their meta fields; Chroma holds no such documents."""
        store.write_documents([Document(id="image", content=None, meta={"title": "A map"}, embedding=embed("map"))])
        encoder = KalmDocumentEncoder(model=FakeReranker(), meta_fields_to_embed=["title"], progress_bar=False)
        n_held = store.count_documents()
        assert n_held == (0 if isinstance(store, ChromaDocumentStore) else 1)
        assert backfill(store, encoder, progress_bar=False).n_missing == n_held
        assert backfill(store, encoder, progress_bar=False) == BackfillReport(n_held, 0, 0)

    def test_it_goes_in_batches_under_one_bar(self, make_reranker: MakeReranker, capsys: pytest.CaptureFixture[str]) -> None:
        store = InMemoryDocumentStore()
        store.write_documents([Document(content=f"text {n}") for n in range(5)])
        encoder = KalmDocumentEncoder(model=make_reranker())
        assert backfill(store, encoder, batch_size=2).n_missing == 5
        shown = capsys.readouterr().err
        assert "5/5" in shown
        assert "2/2" not in shown

    def test_a_failing_store_is_counted(self, caplog: pytest.LogCaptureFixture) -> None:
        class Failing(InMemoryDocumentStore):
            def update_by_filter(self, filters: dict[str, Any], meta: dict[str, Any]) -> int:
                if filters["value"] == "bad":
                    msg = "disk full"
                    raise OSError(msg)
                return super().update_by_filter(filters, meta)

        store = Failing()
        store.write_documents([Document(id="bad", content="a"), Document(id="good", content="b")])
        encoder = KalmDocumentEncoder(model=FakeReranker(), progress_bar=False)
        assert backfill(store, encoder, progress_bar=False) == BackfillReport(n_checked=2, n_missing=2, n_stale=0, n_failed=1)
        assert "a store did not take 1 of 2 encodings, the first being that of bad" in caplog.text
        assert "disk full" in caplog.text

    def test_what_cannot_work_is_refused(self) -> None:
        with pytest.raises(SettingsError, match="must have update_by_filter"):
            backfill(object(), KalmDocumentEncoder(model=FakeReranker()))
        with pytest.raises(SettingsError, match="batch_size must be a positive whole number, but got 0"):
            backfill(InMemoryDocumentStore(), KalmDocumentEncoder(model=FakeReranker()), batch_size=0)


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
