"""Write-back and backfill of LlamaIndex's stores undo nothing that others write meanwhile."""

from __future__ import annotations

import logging

import pytest
from llama_index.core.storage.docstore.types import BaseDocumentStore
from sqlalchemy import event
from tools.llama_index_helpers import (
    QUERY,
    STORES,
    TEXTS,
    change,
    is_as_changed,
    make_index,
    make_nodes,
    node_id,
    opener,
    read,
    then,
)

from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.llama_index import (
    BackfillReport,
    KalmPassageEncoder,
    KalmRerank,
    backfill,
    wait_for_write_back,
    write_back_to,
)
from kalm_integrations.llama_index.stores import access_to
from kalm_integrations.testing import FakeReranker


@pytest.fixture(params=STORES)
def reopen(request, tmp_path):
    """Returns what closes a store and opens it again: a storage context, and where its nodes are."""
    with opener(request, tmp_path / "store", request.param) as open_again:
        yield open_again


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
    access = type(access_to(store))
    monkeypatch.setattr(access, "read", then(access.read, 2, lambda: change(store)))
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


@pytest.mark.parametrize("reopen", ["simple", "redis", "qdrant", "lancedb"], indirect=True)
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
        "LanceDBVectorStore": lambda: (store.table, "merge_insert", 1),
    }[type(store).__name__]()
    monkeypatch.setattr(reader, name, then(getattr(reader, name), nth, lambda: change(store)))
    write_back_to(store)(encoded)
    assert is_as_changed(store)


@pytest.mark.parametrize("reopen", ["postgres", "pgvector"], indirect=True)
def test_postgres_locks_an_entry_from_reading_to_writing_it(reopen):
    context, store = reopen()
    make_index(context, make_nodes())
    owner = store._kvstore if isinstance(store, BaseDocumentStore) else store
    table = owner._table_class.__table__
    entries = table.select()
    if isinstance(store, BaseDocumentStore):
        entries = entries.where(table.c.namespace == store._node_collection)
    n_free = []

    def look_from_outside(connection, cursor, statement, *_):
        if statement.endswith("FOR UPDATE"):
            with connection.engine.connect() as another:
                n_free.append(len(another.execute(entries.with_for_update(skip_locked=True)).all()))

    event.listen(owner._engine, "after_cursor_execute", look_from_outside)
    write_back_to(store)(KalmPassageEncoder(FakeReranker())(make_nodes()[:1]))
    assert n_free == [len(TEXTS) - 1]


@pytest.mark.parametrize("reopen", ["lancedb"], indirect=True)
def test_a_table_that_is_open_elsewhere_is_read_and_written_as_it_is_now(reopen):
    """LanceDB shows a table as it was when it was opened."""
    context, store = reopen()
    make_index(context, make_nodes())
    _, other = reopen()
    change(other)
    encoder = KalmPassageEncoder(FakeReranker())
    assert backfill(store, encoder, show_progress=False) == BackfillReport(n_checked=4, n_missing=4, n_stale=0)
    assert is_as_changed(store)


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
