"""Encodings in the real stores of LlamaIndex: ingest, restart, query without encoding, write-back, backfill."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
import uuid
from datetime import datetime

import chromadb
import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.schema import MetadataMode, NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore
from llama_index.core.storage.docstore.types import BaseDocumentStore
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.core.storage.kvstore.types import MutableMappingKVStore
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.storage.docstore.postgres import PostgresDocumentStore
from llama_index.storage.docstore.redis import RedisDocumentStore
from llama_index.storage.kvstore.postgres import PostgresKVStore
from llama_index.storage.kvstore.redis import RedisKVStore
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient
from sqlalchemy import create_engine, event
from sqlalchemy.ext.asyncio import create_async_engine

from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY
from kalm_integrations.errors import EncodingTooLargeError, SettingsError, StoreError
from kalm_integrations.llama_index import (
    BackfillReport,
    KalmPassageEncoder,
    KalmRerank,
    KVPayloadStore,
    backfill,
    wait_for_write_back,
    write_back_to,
)
from kalm_integrations.testing import FakeReranker

TEXTS = ["the panthers won", "rain is wet", "who lost the game", "who knows", "a wing in a slipstream"]
QUERY = "who won the game"


class CountingEmbedding(MockEmbedding):
    """Counts the texts that were embedded."""

    _count: int = 0

    def _get_text_embedding(self, text: str) -> list[float]:
        self._count += 1
        return super()._get_text_embedding(text)


def make_postgres_kvstore(uri, table, **settings):
    # from_uri would drop the query part of the URI, which says where the socket is.
    return PostgresKVStore(
        table,
        engine=create_engine(uri),
        async_engine=create_async_engine(uri.replace("postgresql://", "postgresql+asyncpg://")),
        **settings,
    )


@pytest.fixture(params=["simple", "redis", "postgres", "chroma", "qdrant"])
def reopen(request, tmp_path):
    """Returns what closes a store and opens it again: a storage context, and where its nodes are."""
    name = f"kalm_{uuid.uuid4().hex}"
    folder = tmp_path / "store"
    opened = {}

    def simple():
        if "context" in opened:
            opened["context"].persist(folder)
        opened["context"] = StorageContext.from_defaults(persist_dir=folder if folder.exists() else None)
        return opened["context"], opened["context"].docstore

    def docstore_backed(docstore):
        vector_store = opened.setdefault("vectors", SimpleVectorStore())
        index_store = opened.setdefault("indices", StorageContext.from_defaults().index_store)
        return StorageContext.from_defaults(docstore, index_store, vector_store), docstore

    def redis():
        kvstore = RedisKVStore(redis_uri=request.getfixturevalue("redis_url"))
        return docstore_backed(RedisDocumentStore(kvstore, namespace=name))

    def postgres():
        kvstore = make_postgres_kvstore(request.getfixturevalue("postgres_uri"), name)
        return docstore_backed(PostgresDocumentStore(kvstore))

    def chroma():
        collection = chromadb.PersistentClient(str(folder)).get_or_create_collection(name)
        store = ChromaVectorStore(chroma_collection=collection)
        return StorageContext.from_defaults(vector_store=store), store

    def qdrant():
        if "client" in opened:
            opened["client"].close()
        opened["client"] = QdrantClient(path=str(folder))
        store = QdrantVectorStore(name, client=opened["client"])
        return StorageContext.from_defaults(vector_store=store), store

    yield locals()[request.param]
    if "client" in opened:
        opened["client"].close()


def node_id(i):
    return str(uuid.UUID(int=i))


def make_nodes():
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")}
    return [
        TextNode(id_=node_id(i), text=text, metadata={"page": i, "author": None}, relationships=source)
        for i, text in enumerate(TEXTS)
    ]


def make_index(context, nodes, embedding=None):
    return VectorStoreIndex(nodes, storage_context=context, embed_model=embedding or CountingEmbedding(embed_dim=3))


def load_index(context, embedding=None):
    embedding = embedding or CountingEmbedding(embed_dim=3)
    if context.vector_store.stores_text:
        return VectorStoreIndex.from_vector_store(context.vector_store, embed_model=embedding)
    return load_index_from_storage(context, embed_model=embedding)


def query(index, **settings):
    postprocessor = KalmRerank(top_n=None, **settings)
    return index.as_query_engine(llm=MockLLM(), similarity_top_k=5, node_postprocessors=[postprocessor]).query(QUERY)


def scores(response):
    return {node.node_id: node.score for node in response.source_nodes}


def test_encodings_outlive_a_restart(reopen, make_reranker):
    nodes = make_nodes()
    context, _ = reopen()
    embedding = CountingEmbedding(embed_dim=3)
    make_index(context, KalmPassageEncoder(make_reranker(storage_codec="fp32"))(nodes), embedding)
    assert embedding._count == len(nodes)
    context, _ = reopen()
    reranker = make_reranker()
    response = query(load_index(context), model=reranker, on_missing="error")
    assert reranker.stats.passages_encoded == 0
    assert reranker.stats.metadata_hits == len(nodes)
    expected = make_reranker().score(QUERY, [node.get_content(MetadataMode.EMBED) for node in nodes])
    assert scores(response) == pytest.approx(dict(zip((n.node_id for n in nodes), expected, strict=True)), abs=1e-6)
    assert not any("kalm" in node.to_json() for node in response.source_nodes)
    assert "kalm" not in response.response


def test_what_a_query_encodes_is_written_back_and_read_after_a_restart(reopen, make_reranker):
    context, store = reopen()
    embedding = CountingEmbedding(embed_dim=3)
    index = make_index(context, make_nodes(), embedding)
    reranker = make_reranker(storage_codec="fp32")
    first = query(index, model=reranker, write_back=write_back_to(store))
    assert wait_for_write_back(10)
    assert reranker.stats.passages_encoded == len(TEXTS)
    context, store = reopen()
    reranker = make_reranker(storage_codec="fp32")
    second = query(load_index(context, embedding), model=reranker, on_missing="error", write_back=write_back_to(store))
    assert reranker.stats.passages_encoded == 0
    assert scores(second) == pytest.approx(scores(first), abs=1e-6)
    assert embedding._count == len(TEXTS)
    write_back_to(store)([])


def test_write_back_changes_nothing_but_the_encoding(reopen, make_reranker):
    """Not even where another postprocessor has changed what was scored."""
    context, store = reopen()
    nodes = [node.model_copy(update={"metadata": {**node.metadata, "window": f"<{node.text}>"}}) for node in make_nodes()]
    index = make_index(context, nodes)
    window = MetadataReplacementPostProcessor("window")

    def ask(index, store):
        reranker = make_reranker()
        rerank = KalmRerank(reranker, keep_retrieval_score=True, write_back=write_back_to(store))
        index.as_query_engine(llm=MockLLM(), similarity_top_k=5, node_postprocessors=[window, rerank]).query(QUERY)
        assert wait_for_write_back(10)
        return reranker.stats.passages_encoded

    assert ask(index, store) == len(nodes)
    context, store = reopen()
    stored = {node.node_id: node for node in load_index(context).as_retriever(similarity_top_k=5).retrieve(QUERY)}
    for node in nodes:
        found = stored[node.node_id]
        assert set(found.metadata) == {*node.metadata, ENCODING_KEY, FINGERPRINT_KEY}
        assert found.node.ref_doc_id == "book"
        for mode in (MetadataMode.EMBED, MetadataMode.LLM, MetadataMode.NONE):
            assert found.get_content(mode) == node.get_content(mode)
    assert ask(load_index(context), store) == 0


def test_backfill_encodes_the_missing_and_the_stale_and_nothing_else(reopen, make_reranker):
    context, store = reopen()
    encoder = KalmPassageEncoder(make_reranker())
    nodes = make_nodes()
    old = KalmPassageEncoder(FakeReranker("old checkpoint"))(nodes[:1])
    embedding = CountingEmbedding(embed_dim=3)
    make_index(context, [*old, *encoder(nodes[1:3]), *nodes[3:]], embedding)
    context, store = reopen()
    fresh = KalmPassageEncoder(make_reranker())
    report = backfill(store, fresh, batch_size=2, show_progress=False)
    assert report == BackfillReport(n_checked=5, n_missing=2, n_stale=1)
    assert fresh.reranker.stats.passages_encoded == 3
    assert backfill(store, fresh, show_progress=False) == BackfillReport(n_checked=5, n_missing=0, n_stale=0)
    context, store = reopen()
    last = make_reranker()
    query(load_index(context), model=last, on_missing="error")
    assert last.stats.passages_encoded == 0
    assert embedding._count == len(TEXTS)


def test_backfill_finds_damage_behind_a_good_fingerprint_unless_told_to_believe_it(reopen):
    context, store = reopen()
    encoder = KalmPassageEncoder(FakeReranker())
    nodes = encoder(make_nodes())
    damaged = nodes[0].model_copy(update={"metadata": {**nodes[0].metadata, ENCODING_KEY: "kalm1.broken"}})
    make_index(context, [damaged, *nodes[1:]])
    context, store = reopen()
    assert backfill(store, encoder, check_texts=False, show_progress=False) == BackfillReport(0, 0, 0)
    assert backfill(store, encoder, show_progress=False) == BackfillReport(n_checked=5, n_missing=0, n_stale=1)
    assert backfill(store, encoder, show_progress=False) == BackfillReport(n_checked=5, n_missing=0, n_stale=0)


# What others write meanwhile.


def change(store):
    """What another client does: one node gets another text under its old id, one is deleted."""
    new = TextNode(id_=node_id(0), text="a new text", metadata={"page": "new"}, embedding=[1.0, 0.0, 0.0])
    if isinstance(store, BaseDocumentStore):
        store.add_documents([new])
        store.delete_document(node_id(1))
    else:
        store.delete_nodes([node_id(0), node_id(1)])
        store.add([new])


def read(store, *numbers):
    settings = {"raise_error": False} if isinstance(store, BaseDocumentStore) else {}
    return sorted(store.get_nodes([node_id(i) for i in numbers], **settings), key=lambda node: node.node_id)


def is_as_changed(store):
    """Whether all of what the other client wrote is there still."""
    [new] = read(store, 0, 1)
    others = {key: value for key, value in new.metadata.items() if key not in (ENCODING_KEY, FINGERPRINT_KEY)}
    return (new.node_id, new.text, others) == (node_id(0), "a new text", {"page": "new"})


def then(function, nth, what):
    """Return a function after which, when it has returned the nth time, something else happens at once."""
    calls = itertools.count(1)

    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(calls) == nth:
            what()
        return result

    return call


def test_backfill_passes_over_what_others_changed_while_it_encoded(reopen):
    context, store = reopen()
    make_index(context, make_nodes())
    fake = FakeReranker()
    fake.encode_to_metadata = then(fake.encode_to_metadata, 1, lambda: change(store))
    report = backfill(store, KalmPassageEncoder(fake), show_progress=False)
    assert report == BackfillReport(n_checked=5, n_missing=5, n_stale=0, n_gone=1, n_changed=1)
    assert is_as_changed(store)
    assert [ENCODING_KEY in node.metadata for node in read(store, 0, 2, 3, 4)] == [False, True, True, True]
    assert backfill(store, KalmPassageEncoder(fake), show_progress=False) == BackfillReport(4, 1, 0)


def test_backfill_undoes_nothing_that_happens_after_its_last_look_at_the_texts(reopen, monkeypatch):
    """The encoding that the new text may get then is known to be of another one."""
    context, store = reopen()
    make_index(context, make_nodes())
    monkeypatch.setattr(type(store), "get_nodes", then(type(store).get_nodes, 2, lambda: change(store)))
    encoder = KalmPassageEncoder(FakeReranker())
    backfill(store, encoder, show_progress=False)
    assert is_as_changed(store)
    assert backfill(store, encoder, show_progress=False) == BackfillReport(n_checked=4, n_missing=0, n_stale=1)


def test_write_back_passes_over_a_text_that_changed_since_it_was_retrieved(reopen, caplog):
    context, store = reopen()
    retrieved = make_index(context, make_nodes()).as_retriever(similarity_top_k=5).retrieve(QUERY)
    change(store)
    with caplog.at_level(logging.WARNING, logger="kalm_integrations"):
        KalmRerank(FakeReranker(), write_back=write_back_to(store)).postprocess_nodes(retrieved, query_str=QUERY)
        assert wait_for_write_back(10)
    assert "2 of 5 encodings were not written back: 1 gone, 1 have another text now" in caplog.text
    assert is_as_changed(store)
    assert [ENCODING_KEY in node.metadata for node in read(store, 0, 2, 3, 4)] == [False, True, True, True]


@pytest.mark.parametrize("reopen", ["simple", "redis", "qdrant"], indirect=True)
def test_nothing_is_undone_that_happens_between_reading_and_writing_an_entry(reopen, monkeypatch):
    """Where the store can write on a condition, or the entry itself can be changed."""
    context, store = reopen()
    make_index(context, make_nodes())
    encoded = KalmPassageEncoder(FakeReranker())(make_nodes()[:2])
    # Document stores read two entries to look at the texts; the third read is for writing the first of them.
    reader, name, nth = {
        "SimpleDocumentStore": lambda: (store._kvstore, "get", 3),
        "RedisDocumentStore": lambda: (store._kvstore._redis_client, "hget", 3),
        "QdrantVectorStore": lambda: (store.client, "retrieve", 1),
    }[type(store).__name__]()
    monkeypatch.setattr(reader, name, then(getattr(reader, name), nth, lambda: change(store)))
    write_back_to(store)(encoded)
    assert is_as_changed(store)


@pytest.mark.parametrize("reopen", ["postgres"], indirect=True)
def test_postgres_locks_an_entry_from_reading_to_writing_it(reopen):
    context, store = reopen()
    make_index(context, make_nodes())
    table = store._kvstore._table_class.__table__
    entries = table.select().where(table.c.namespace == store._node_collection)
    n_free = []

    def look_from_outside(connection, cursor, statement, *_):
        if statement.endswith("FOR UPDATE"):
            with connection.engine.connect() as another:
                n_free.append(len(another.execute(entries.with_for_update(skip_locked=True)).all()))

    event.listen(store._kvstore._engine, "after_cursor_execute", look_from_outside)
    write_back_to(store)(KalmPassageEncoder(FakeReranker())(make_nodes()[:1]))
    assert n_free == [len(TEXTS) - 1]


@pytest.mark.parametrize("reopen", ["simple", "redis", "postgres"], indirect=True)
def test_document_stores_keep_what_they_know_of_sources_and_hashes(reopen):
    """`add_documents` would write both anew, from nodes that may be old by then."""
    context, store = reopen()
    make_index(context, make_nodes())

    def known():
        return store.get_ref_doc_info("book").to_dict(), [store.get_document_hash(node_id(i)) for i in range(len(TEXTS))]

    before = known()
    assert backfill(store, KalmPassageEncoder(FakeReranker()), show_progress=False).n_missing == len(TEXTS)
    assert known() == before


def test_document_stores_over_any_key_value_store_are_known():
    store = KVDocumentStore(MutableMappingKVStore(dict))
    store.add_documents(make_nodes())
    encoder = KalmPassageEncoder(FakeReranker())
    assert backfill(store, encoder, show_progress=False) == BackfillReport(n_checked=5, n_missing=5, n_stale=0)
    change(store)
    write_back_to(store)(encoder(make_nodes()))
    assert is_as_changed(store)
    assert backfill(store, encoder, show_progress=False) == BackfillReport(n_checked=4, n_missing=1, n_stale=0)


def test_a_collection_that_another_host_filled_gets_the_two_keys_and_no_more():
    """LlamaIndex reads it too; a node in LlamaIndex' own form beside the metadata would hide what that host writes later."""
    collection = chromadb.EphemeralClient().create_collection(f"kalm_{uuid.uuid4().hex}")
    collection.add(ids=["a"], documents=["a text"], metadatas=[{"page": 1}], embeddings=[[1.0, 0.0]])
    store, encoder = ChromaVectorStore(chroma_collection=collection), KalmPassageEncoder(FakeReranker())
    assert backfill(store, encoder, show_progress=False) == BackfillReport(n_checked=1, n_missing=1, n_stale=0)
    assert collection.get()["metadatas"][0].keys() == {"page", ENCODING_KEY, FINGERPRINT_KEY}
    assert backfill(store, encoder, show_progress=False) == BackfillReport(n_checked=1, n_missing=0, n_stale=0)


def test_an_access_of_the_users_own_is_taken():
    class Shelf:
        def __init__(self):
            self.nodes = {node.node_id: node for node in make_nodes()}

        def find_ids(self, without):
            return [i for i, node in self.nodes.items() if without is None or not without.is_on(node.metadata)]

        def read(self, ids):
            return {i: self.nodes[i] for i in ids if i in self.nodes}

        def add_metadata(self, changes):
            for i, added in changes.items():
                self.nodes[i].metadata.update(added)

    shelf, encoder = Shelf(), KalmPassageEncoder(FakeReranker())
    write_back_to(shelf)(encoder(make_nodes()[:1]))
    assert backfill(shelf, encoder, show_progress=False) == BackfillReport(n_checked=5, n_missing=4, n_stale=0)


# Restarts, pipelines, reports.


def test_a_persisted_index_is_queried_in_a_new_process_without_encoding(tmp_path, tiny_checkpoint):
    documents = [Document(id_=f"d{i}", text=text, metadata={"source": i}) for i, text in enumerate(TEXTS)]
    nodes = IngestionPipeline(transformations=[KalmPassageEncoder(tiny_checkpoint)]).run(documents=documents)
    index = make_index(None, nodes)
    index.storage_context.persist(tmp_path)
    reranker = KalmPassageEncoder(tiny_checkpoint).reranker
    expected = scores(query(index, model=reranker))
    program = f"""
import json
from llama_index.core import MockEmbedding, StorageContext, load_index_from_storage
from llama_index.core.llms import MockLLM
from kalm_integrations.llama_index import KalmRerank

context = StorageContext.from_defaults(persist_dir={str(tmp_path)!r})
index = load_index_from_storage(context, embed_model=MockEmbedding(embed_dim=3))
rerank = KalmRerank({str(tiny_checkpoint)!r}, top_n=None)
engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=5, node_postprocessors=[rerank])
nodes = engine.query({QUERY!r}).source_nodes
stats = rerank.reranker.stats
print(json.dumps([stats.passages_encoded, stats.metadata_hits, {{node.node_id: node.score for node in nodes}}]))
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    n_encoded, n_hits, found = json.loads(done.stdout.splitlines()[-1])
    assert (n_encoded, n_hits) == (0, 5)
    assert found == pytest.approx(expected, abs=1e-6)


def test_write_back_does_not_make_pipelines_ingest_again():
    """A document that was not split is known to the pipeline by its hash, which covers metadata."""
    docstore, fake = SimpleDocumentStore(), FakeReranker()
    documents = [Document(id_=f"d{i}", text=text) for i, text in enumerate(TEXTS)]
    pipeline = IngestionPipeline(
        transformations=[MockEmbedding(embed_dim=3)], docstore=docstore, vector_store=SimpleVectorStore()
    )
    nodes = pipeline.run(documents=documents)
    retrieved = [NodeWithScore(node=node, score=0.1) for node in nodes]
    KalmRerank(fake, write_back=write_back_to(docstore)).postprocess_nodes(retrieved, query_str=QUERY)
    assert wait_for_write_back(10)
    assert backfill(docstore, KalmPassageEncoder(fake), show_progress=False) == BackfillReport(5, 0, 0)
    assert pipeline.run(documents=documents) == []


def test_refresh_after_write_back_finds_nothing_new():
    docstore, fake = SimpleDocumentStore(), FakeReranker()
    documents = [Document(id_=f"d{i}", text=text) for i, text in enumerate(TEXTS)]
    context = StorageContext.from_defaults(docstore=docstore)
    index = VectorStoreIndex.from_documents(documents, storage_context=context, embed_model=MockEmbedding(embed_dim=3))
    query(index, model=fake, write_back=write_back_to(docstore))
    assert wait_for_write_back(10)
    assert all(ENCODING_KEY in node.metadata for node in docstore.docs.values())
    assert index.refresh_ref_docs(documents) == [False] * len(documents)
    index.delete_ref_doc("d0", delete_from_docstore=True)
    assert len(docstore.docs) == len(documents) - 1


def test_backfill_finds_every_node_and_pipelines_still_know_their_documents():
    """Small-to-big retrieval returns what other nodes come from; a pipeline's docstore holds its source documents."""
    docstore, encoder = SimpleDocumentStore(), KalmPassageEncoder(FakeReranker())
    documents = [Document(id_=f"d{i}", text=" ".join(TEXTS)) for i in range(2)]
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=12, chunk_overlap=0), MockEmbedding(embed_dim=3)],
        docstore=docstore,
        vector_store=SimpleVectorStore(),
    )
    docstore.add_documents(chunks := pipeline.run(documents=documents))
    assert len(docstore.docs) == len(chunks) + len(documents)
    assert backfill(docstore, encoder, show_progress=False).n_missing == len(docstore.docs)
    retrieved = [NodeWithScore(node=node) for node in docstore.docs.values()]
    assert KalmRerank(FakeReranker(), on_missing="error").postprocess_nodes(retrieved, query_str=QUERY)
    assert pipeline.run(documents=documents) == []


def test_bad_batch_size_is_refused():
    with pytest.raises(SettingsError, match="batch_size must be a positive whole number, but got 0"):
        backfill(SimpleDocumentStore(), KalmPassageEncoder(FakeReranker()), batch_size=0)


def test_backfill_shows_progress_if_asked(capsys):
    docstore = SimpleDocumentStore()
    docstore.add_documents(make_nodes())
    backfill(docstore, KalmPassageEncoder(FakeReranker()), show_progress=False)
    assert capsys.readouterr().err == ""
    backfill(docstore, KalmPassageEncoder(FakeReranker("other")))
    assert "5/5" in capsys.readouterr().err


def test_nodes_that_a_store_does_not_have_are_left_out_and_logged(caplog):
    docstore = SimpleDocumentStore()
    docstore.add_documents(make_nodes()[:2])
    retrieved = [NodeWithScore(node=node, score=0.1) for node in make_nodes()]
    with caplog.at_level(logging.WARNING, logger="kalm_integrations"):
        KalmRerank(FakeReranker(), write_back=write_back_to(docstore)).postprocess_nodes(retrieved, query_str=QUERY)
        assert wait_for_write_back(10)
    assert "3 of 5 encodings were not written back: 3 gone" in caplog.text
    assert [ENCODING_KEY in node.metadata for node in docstore.docs.values()] == [True, True]


@pytest.mark.parametrize("function", [write_back_to, lambda store: backfill(store, KalmPassageEncoder(FakeReranker()))])
def test_unknown_stores_are_refused_with_what_to_do(function):
    with pytest.raises(SettingsError, match=r"store must be .*but got SimpleVectorStore; .*DocumentAccess.*write_back"):
        function(SimpleVectorStore())


def test_jsonb_docstores_reorder_metadata_and_backfill_settles_it(postgres_uri):
    """PostgreSQL's jsonb sorts keys, so the text for embedding differs from the one at ingest; json keeps them."""
    kvstore = make_postgres_kvstore(postgres_uri, f"kalm_{uuid.uuid4().hex}", use_jsonb=True)
    docstore = PostgresDocumentStore(kvstore)
    fake = FakeReranker()
    [node] = KalmPassageEncoder(fake)([TextNode(id_="n", text="text", metadata={"zebra": 1, "ant": 2})])
    docstore.add_documents([node])
    [stored] = docstore.get_nodes(["n"])
    assert stored.get_content(MetadataMode.EMBED) != node.get_content(MetadataMode.EMBED)
    encoder = KalmPassageEncoder(fake)
    assert backfill(docstore, encoder, show_progress=False).n_stale == 1
    [ranked] = KalmRerank(fake, on_missing="error").postprocess_nodes(
        [NodeWithScore(node=node) for node in docstore.get_nodes(["n"])], query_str=QUERY
    )
    assert ranked.node_id == "n"


def test_dates_come_back_in_another_form_and_backfill_settles_it():
    fake = FakeReranker()
    encoder = KalmPassageEncoder(fake)
    [node] = encoder([TextNode(text="text", metadata={"day": datetime(2024, 1, 1)}, embedding=[1.0, 2.0])])
    store = ChromaVectorStore(chroma_collection=chromadb.EphemeralClient().create_collection(f"kalm_{uuid.uuid4().hex}"))
    store.add([node])
    assert "2024-01-01T00:00:00" in store.get_nodes(None)[0].get_content(MetadataMode.EMBED)
    assert "2024-01-01 00:00:00" in node.get_content(MetadataMode.EMBED)
    assert backfill(store, encoder, show_progress=False).n_stale == 1
    retrieved = [NodeWithScore(node=node) for node in store.get_nodes(None)]
    assert KalmRerank(fake, on_missing="error").postprocess_nodes(retrieved, query_str=QUERY)


@pytest.mark.parametrize("kind", ["simple", "redis", "postgres"])
def test_payloads_live_in_a_key_value_store(request, kind, make_reranker):
    name = f"kalm_{uuid.uuid4().hex}"
    if kind == "simple":
        kvstore = SimpleKVStore()
    elif kind == "redis":
        kvstore = RedisKVStore(redis_uri=request.getfixturevalue("redis_url"))
    else:
        kvstore = make_postgres_kvstore(request.getfixturevalue("postgres_uri"), name)
    payloads = KVPayloadStore(kvstore, collection=name)
    reference = {"storage_mode": "reference", "payload_store": payloads}
    nodes = make_nodes()
    encoded = KalmPassageEncoder(make_reranker(**reference))(nodes)
    assert max(len(node.metadata[ENCODING_KEY]) for node in encoded) < 512
    assert len(payloads) == len(list(payloads)) == len(nodes)

    reranker = make_reranker(payload_store=KVPayloadStore(kvstore, collection=name))
    retrieved = [NodeWithScore(node=node) for node in encoded]
    assert KalmRerank(reranker, on_missing="error").postprocess_nodes(retrieved, query_str=QUERY)
    assert reranker.stats.passages_encoded == 0

    key = next(iter(payloads))
    del payloads[key]
    assert key not in payloads
    with pytest.raises(KeyError):
        del payloads[key]
    kvstore.put(key, {"payload": "nö base64"}, collection=name)
    assert payloads.get(key) is None
    lost = make_reranker(payload_store=payloads)
    KalmRerank(lost).postprocess_nodes(retrieved, query_str=QUERY)
    assert lost.stats.corrupt == lost.stats.passages_encoded == 1


def test_a_server_that_dies_fails_no_query(mortal_redis, make_reranker):
    """Its payloads are computed, at the price of one failed call; what is to be written there is refused."""
    url, server = mortal_redis
    settings = {"storage_mode": "reference", "cache_bytes": 0, "prefix_cache_bytes": 0}
    reranker = make_reranker(payload_store=KVPayloadStore(RedisKVStore(redis_uri=url)), **settings)
    retrieved = [NodeWithScore(node=node) for node in KalmPassageEncoder(reranker)(make_nodes())]
    before = KalmRerank(reranker, on_missing="error").postprocess_nodes(retrieved, query_str=QUERY)
    assert reranker.stats.store_failures == 0
    server.kill()
    server.wait(10)
    n_encoded = reranker.stats.passages_encoded
    for _ in range(2):
        after = KalmRerank(reranker).postprocess_nodes(retrieved, query_str=QUERY)
        assert [node.node.node_id for node in after] == [node.node.node_id for node in before]
        assert [node.score for node in after] == pytest.approx([node.score for node in before], abs=1e-3)
    assert reranker.stats.store_failures == 1
    assert reranker.stats.passages_encoded == n_encoded + 2 * len(retrieved)
    with pytest.raises(StoreError, match=r"payload_store cannot be used: KVPayloadStore raised ConnectionError"):
        KalmPassageEncoder(reranker)(make_nodes())


def test_max_inline_bytes_is_kept_or_refused_before_anything_is_stored(tiny_checkpoint):
    docstore = SimpleDocumentStore()
    nodes = [TextNode(text=" ".join(TEXTS * 3))]
    whole = KalmPassageEncoder(tiny_checkpoint)(nodes)[0].metadata[ENCODING_KEY]
    [node] = KalmPassageEncoder(tiny_checkpoint, max_inline_bytes=len(whole) // 2)(nodes)
    assert len(node.metadata[ENCODING_KEY]) <= len(whole) // 2
    with pytest.raises(EncodingTooLargeError, match="max_inline_bytes=100"):
        docstore.add_documents(KalmPassageEncoder(tiny_checkpoint, max_inline_bytes=100)(nodes))
    assert not docstore.docs


def test_a_payload_store_may_come_with_the_other_settings(tiny_checkpoint):
    payloads = KVPayloadStore(SimpleKVStore())
    settings = {"storage_mode": "reference", "payload_store": payloads}
    encoder = KalmPassageEncoder(tiny_checkpoint, model_kwargs=settings)
    IngestionPipeline(transformations=[encoder]).run(nodes=make_nodes())
    assert len(payloads) == len(TEXTS)
    assert encoder.to_dict()["model_kwargs"] == {"storage_mode": "reference"}
