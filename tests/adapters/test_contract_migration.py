"""A store changes its checkpoint while it is queried: scores are right throughout, under the old model and the new one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from haystack import Document as HaystackDocument
from haystack.document_stores.in_memory import InMemoryDocumentStore
from langchain_core.documents import Document as LangChainDocument
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_postgres import PGVector
from llama_index.core.schema import TextNode
from llama_index.storage.docstore.postgres import PostgresDocumentStore
from llama_index.storage.kvstore.postgres import PostgresKVStore
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from tools import hosts
from tools.waiting import until

from kalm_integrations import KalmReranker, haystack, langchain, llama_index
from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.hosting.documents import fingerprint_key

QUERY = "what did the Panthers do"
TEXTS = [f"Passage {i}: the Panthers {'won' if i % 3 else 'lost'} game number {i * 7}." for i in range(12)]
NEW_KEY = "kalm_encoding_2"


@dataclass(frozen=True)
class Collection:
    """Documents in a store of a host."""

    host: hosts.Host
    retrieve: Callable[[], list[Any]]
    """All documents, as a query gets them."""
    backfill: Callable[[Any], Any]
    """With an encoder of the host."""
    drop: Callable[[str], Any]
    """The encodings under a key."""


def on_langchain(postgres_uri: str) -> Collection:
    uri = postgres_uri.replace("postgresql://", "postgresql+psycopg://")
    store = PGVector(DeterministicFakeEmbedding(size=8), connection=uri, collection_name=f"migration-{uuid4()}")
    # Its table keeps ids once, whatever the collection.
    store.add_documents([LangChainDocument(text, id=str(uuid4())) for text in TEXTS])
    return Collection(
        hosts.LangChain(),
        lambda: store.similarity_search(QUERY, k=len(TEXTS)),
        lambda encoder: langchain.backfill(store, encoder, batch_size=2, show_progress=False),
        lambda key: langchain.drop_encodings(store, encoding_key=key, show_progress=False),
    )


def on_llama_index(postgres_uri: str) -> Collection:
    # from_uri would drop the query part of the URI, which says where the socket is.
    engines = [
        create_engine(postgres_uri),
        create_async_engine(postgres_uri.replace("postgresql://", "postgresql+asyncpg://")),
    ]
    store = PostgresDocumentStore(PostgresKVStore(f"migration_{uuid4().hex[:8]}", engine=engines[0], async_engine=engines[1]))
    store.add_documents([TextNode(text=text, id_=f"id-{i}") for i, text in enumerate(TEXTS)])
    return Collection(
        hosts.LlamaIndex(),
        lambda: store.get_nodes([f"id-{i}" for i in range(len(TEXTS))]),
        lambda encoder: llama_index.backfill(store, encoder, batch_size=2, show_progress=False),
        lambda key: llama_index.drop_encodings(store, encoding_key=key, show_progress=False),
    )


def on_haystack(postgres_uri: str) -> Collection:
    store = InMemoryDocumentStore()
    store.write_documents([HaystackDocument(content=text, id=f"id-{i}") for i, text in enumerate(TEXTS)])
    return Collection(
        hosts.Haystack(),
        store.filter_documents,
        lambda encoder: haystack.backfill(store, encoder, batch_size=2, progress_bar=False),
        lambda key: haystack.drop_encodings(store, encoding_key=key, progress_bar=False),
    )


@pytest.mark.parametrize("fill", [on_langchain, on_llama_index, on_haystack])
@pytest.mark.parametrize("new_key", [NEW_KEY, ENCODING_KEY], ids=["side by side", "in place"])
def test_queries_are_right_while_a_store_changes_its_checkpoint(
    make_reranker: Callable[..., KalmReranker],
    other_checkpoint: Path,
    postgres_uri: str,
    fill: Callable[[str], Collection],
    new_key: str,
) -> None:
    """Side by side, no query under the old model encodes anything; when all is done, none under the new one does."""
    collection = fill(postgres_uri)
    host = collection.host

    def ask(model: KalmReranker, key: str, **settings: Any) -> dict[str, float]:
        ranked = host.rerank(model, QUERY, collection.retrieve(), len(TEXTS), encoding_key=key, **settings)
        assert all("kalm1" not in str(host.metadata(document)) for document in ranked)
        return {host.key(document): host.score(document) for document in ranked}

    expected_old = ask(make_reranker(), ENCODING_KEY)
    expected_new = ask(make_reranker(other_checkpoint), ENCODING_KEY)
    assert expected_old != pytest.approx(expected_new, abs=1e-3), "a wrong encoding would not be seen"
    collection.backfill(host.encoder(model=make_reranker()))
    old, new = make_reranker(cache_bytes=0), make_reranker(other_checkpoint, cache_bytes=0)
    n_asked, stop, wrong = 0, threading.Event(), []

    def keep_asking() -> None:
        nonlocal n_asked
        while not stop.is_set():
            for model, key, expected in ((old, ENCODING_KEY, expected_old), (new, new_key, expected_new)):
                found = ask(model, key)
                if found != pytest.approx(expected, abs=1e-5):
                    wrong.append((key, found))
            n_asked += 1

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        until(lambda: n_asked > 0)
        collection.backfill(host.encoder(model=make_reranker(other_checkpoint), encoding_key=new_key))
        asked_meanwhile = n_asked
        until(lambda: n_asked > asked_meanwhile)
    finally:
        stop.set()
        asking.join()
    assert not wrong
    if new_key == NEW_KEY:
        assert old.stats.passages_encoded == 0
        assert ask(old, ENCODING_KEY, on_missing="error") == pytest.approx(expected_old, abs=1e-5)
    assert ask(new, new_key, on_missing="error") == pytest.approx(expected_new, abs=1e-5)


@pytest.mark.parametrize("fill", [on_langchain, on_llama_index, on_haystack])
def test_what_a_store_no_longer_needs_is_dropped(
    make_reranker: Callable[..., KalmReranker], other_checkpoint: Path, postgres_uri: str, fill: Callable[[str], Collection]
) -> None:
    """The old encodings go, the new ones stay, and nothing is left behind."""
    collection = fill(postgres_uri)
    host, new = collection.host, make_reranker(other_checkpoint)
    bare = [host.metadata(document) for document in collection.retrieve()]
    collection.backfill(host.encoder(model=make_reranker()))
    collection.backfill(host.encoder(model=new, encoding_key=NEW_KEY))
    assert collection.drop(ENCODING_KEY).n_written == len(TEXTS)
    for document in collection.retrieve():
        assert host.metadata(document).keys() & {ENCODING_KEY, fingerprint_key(ENCODING_KEY)} == set()
    host.rerank(new, QUERY, collection.retrieve(), 1, encoding_key=NEW_KEY, on_missing="error")
    assert collection.drop(ENCODING_KEY).n_written == 0
    assert collection.drop(NEW_KEY).n_written == len(TEXTS)
    assert [host.metadata(document) for document in collection.retrieve()] == bare
