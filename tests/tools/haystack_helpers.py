"""Haystack's real stores, opened as a new process would open them, and documents and pipelines for them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from haystack import Document, Pipeline, component
from haystack.components.preprocessors import DocumentSplitter
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.document_stores.types import DuplicatePolicy
from haystack.utils import Secret
from haystack_integrations.components.retrievers.chroma import ChromaEmbeddingRetriever
from haystack_integrations.components.retrievers.pgvector import PgvectorEmbeddingRetriever
from haystack_integrations.components.retrievers.qdrant import QdrantEmbeddingRetriever
from haystack_integrations.document_stores.chroma import ChromaDocumentStore
from haystack_integrations.document_stores.pgvector import PgvectorDocumentStore
from haystack_integrations.document_stores.qdrant import QdrantDocumentStore

from kalm_integrations import KalmReranker
from kalm_integrations.haystack import KalmDocumentEncoder, KalmRanker

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


STORES = ("in_memory", "chroma", "qdrant", "pgvector", "any")
"""What `open_backend` takes."""


def open_backend(request: Any, folder: Path, kind: str) -> Backend:
    """A store in a folder, or in the PostgreSQL of a test."""
    if kind == "pgvector":
        return pgvector(request.getfixturevalue("postgres_uri"))
    if kind == "any":
        return in_memory(folder, AnyStore)
    return {"in_memory": in_memory, "chroma": chroma, "qdrant": qdrant}[kind](folder)


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
