"""LlamaIndex's real stores, opened as a new process would open them, and nodes and queries for them."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromadb
from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.schema import BaseNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.storage.docstore.types import BaseDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.storage.docstore.postgres import PostgresDocumentStore
from llama_index.storage.docstore.redis import RedisDocumentStore
from llama_index.storage.kvstore.postgres import PostgresKVStore
from llama_index.storage.kvstore.redis import RedisKVStore
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.lancedb import LanceDBVectorStore
from llama_index.vector_stores.postgres import PGVectorStore
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient
from sqlalchemy import NullPool, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY
from kalm_integrations.llama_index import KalmRerank

TEXTS = ["the panthers won", "rain is wet", "who lost the game", "who knows", "a wing in a slipstream"]
QUERY = "who won the game"


class CountingEmbedding(MockEmbedding):
    """Counts the texts that were embedded."""

    _count: int = 0

    def _get_text_embedding(self, text: str) -> list[float]:
        self._count += 1
        found: list[float] = super()._get_text_embedding(text)
        return found


def _engines(uri: str) -> dict[str, Any]:
    # from_uri and connection strings would drop the query part of the URI, which says where the socket is.
    asynchronous = create_async_engine(uri.replace("postgresql://", "postgresql+asyncpg://"), poolclass=NullPool)
    return {"engine": create_engine(uri, poolclass=NullPool), "async_engine": asynchronous}


def make_postgres_kvstore(uri: str, table: str, **settings: Any) -> PostgresKVStore:
    """A key-value store in a table of a PostgreSQL."""
    return PostgresKVStore(table, **_engines(uri), **settings)


STORES = ("simple", "redis", "postgres", "chroma", "qdrant", "pgvector", "lancedb")
"""What `opener` takes."""


@contextmanager
def opener(request: Any, folder: Path, kind: str) -> Iterator[Callable[[], tuple[StorageContext, Any]]]:
    """What closes a store and opens it again: a storage context, and where its nodes are."""
    name = f"kalm_{uuid.uuid4().hex}"
    opened: dict[str, Any] = {}

    def simple() -> tuple[StorageContext, Any]:
        if "context" in opened:
            opened["context"].persist(folder)
        opened["context"] = StorageContext.from_defaults(persist_dir=folder if folder.exists() else None)
        return opened["context"], opened["context"].docstore

    def docstore_backed(docstore: Any) -> tuple[StorageContext, Any]:
        vector_store = opened.setdefault("vectors", SimpleVectorStore())
        index_store = opened.setdefault("indices", StorageContext.from_defaults().index_store)
        return StorageContext.from_defaults(docstore, index_store, vector_store), docstore

    def redis() -> tuple[StorageContext, Any]:
        kvstore = RedisKVStore(redis_uri=request.getfixturevalue("redis_url"))
        return docstore_backed(RedisDocumentStore(kvstore, namespace=name))

    def postgres() -> tuple[StorageContext, Any]:
        kvstore = make_postgres_kvstore(request.getfixturevalue("postgres_uri"), name)
        return docstore_backed(PostgresDocumentStore(kvstore))

    def vector_backed(store: Any) -> tuple[StorageContext, Any]:
        return StorageContext.from_defaults(vector_store=store), store

    def chroma() -> tuple[StorageContext, Any]:
        return vector_backed(
            ChromaVectorStore(chroma_collection=chromadb.PersistentClient(str(folder)).get_or_create_collection(name))
        )

    def qdrant() -> tuple[StorageContext, Any]:
        if "client" in opened:
            opened["client"].close()
        opened["client"] = QdrantClient(path=str(folder))
        return vector_backed(QdrantVectorStore(name, client=opened["client"]))

    def pgvector() -> tuple[StorageContext, Any]:
        engines = _engines(request.getfixturevalue("postgres_uri"))
        return vector_backed(PGVectorStore(table_name=name, embed_dim=3, **engines))

    def lancedb() -> tuple[StorageContext, Any]:
        return vector_backed(LanceDBVectorStore(str(folder), name))

    yield locals()[kind]
    if "client" in opened:
        opened["client"].close()


def node_id(i: int) -> str:
    """An id that Qdrant takes too."""
    return str(uuid.UUID(int=i))


def make_nodes() -> list[TextNode]:
    """One node for each text, without an encoding."""
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")}
    return [
        TextNode(id_=node_id(i), text=text, metadata={"page": i, "author": None}, relationships=source)
        for i, text in enumerate(TEXTS)
    ]


def make_index(context: StorageContext, nodes: Sequence[BaseNode], embedding: Any = None) -> VectorStoreIndex:
    """An index over nodes, which it puts into the stores of the context."""
    return VectorStoreIndex(nodes, storage_context=context, embed_model=embedding or CountingEmbedding(embed_dim=3))


def load_index(context: StorageContext, embedding: Any = None) -> Any:
    """The index that was made in the stores of the context."""
    embedding = embedding or CountingEmbedding(embed_dim=3)
    if context.vector_store.stores_text:
        return VectorStoreIndex.from_vector_store(context.vector_store, embed_model=embedding)
    return load_index_from_storage(context, embed_model=embedding)


def query(index: Any, **settings: Any) -> Any:
    """Ask an index through a reranker."""
    postprocessor = KalmRerank(top_n=None, **settings)
    return index.as_query_engine(llm=MockLLM(), similarity_top_k=5, node_postprocessors=[postprocessor]).query(QUERY)


def scores(response: Any) -> dict[str, float]:
    """Scores by node."""
    return {node.node_id: node.score for node in response.source_nodes}


def change(store: Any) -> None:
    """What another client does: one node gets another text under its old id, one is deleted."""
    new = TextNode(id_=node_id(0), text="a new text", metadata={"page": 7}, embedding=[1.0, 0.0, 0.0])
    delete(store, node_id(0), node_id(1))
    if isinstance(store, BaseDocumentStore):
        store.add_documents([new])
    else:
        store.add([new])


def delete(store: Any, *ids: str) -> None:
    """Delete nodes."""
    if isinstance(store, BaseDocumentStore):
        for document_id in ids:
            store.delete_document(document_id)
    elif isinstance(store, LanceDBVectorStore):
        # Its own delete_nodes quotes ids as if they were columns.
        store.table.delete(f"id in ({_quoted(ids)})")
    else:
        store.delete_nodes(list(ids))


def _quoted(ids: Iterable[str]) -> str:
    return ", ".join(map(repr, ids))


def read(store: Any, *numbers: int) -> list[BaseNode]:
    """Nodes by number, in order."""
    ids = [node_id(i) for i in numbers]
    if isinstance(store, BaseDocumentStore):
        found = store.get_nodes(ids, raise_error=False)
    elif isinstance(store, LanceDBVectorStore):
        # The same quotes.
        found = store.get_nodes(where=f"id in ({_quoted(ids)})")
    else:
        found = store.get_nodes(ids)
    return sorted(found, key=lambda node: node.node_id)


def is_as_changed(store: Any) -> bool:
    """Whether all of what the other client wrote is there still."""
    [new] = read(store, 0, 1)
    others = {key: value for key, value in new.metadata.items() if key not in (ENCODING_KEY, FINGERPRINT_KEY)}
    return (new.node_id, new.text, others) == (node_id(0), "a new text", {"page": 7})


def then(function: Callable[..., Any], nth: int, what: Callable[[], object]) -> Callable[..., Any]:
    """Return a function after which, when it has returned the nth time, something else happens at once."""
    calls = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if next(calls) == nth:
            what()
        return result

    return call
