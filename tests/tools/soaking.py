"""Real stores of the three hosts behind one face, for a soak: ingest, query with write-back, update, delete, backfill."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import chromadb
from chromadb.config import Settings
from haystack import Document as HaystackDocument
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.document_stores.types import DuplicatePolicy
from haystack_integrations.document_stores.qdrant import QdrantDocumentStore
from langchain_chroma import Chroma
from langchain_core.documents import Document as LangChainDocument
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import VectorStoreQuery
from llama_index.vector_stores.chroma import ChromaVectorStore

from haystack_integrations.common.kalm.stores import access_to
from kalm_integrations import KalmReranker, haystack, langchain, llama_index
from kalm_integrations.hosting.stores import write_encodings

DIMENSION = 8
EMBEDDINGS = DeterministicFakeEmbedding(size=DIMENSION)


class Found(NamedTuple):
    """A document that a host returned."""

    key: str
    text: str
    score: float


class Shelf(ABC):
    """A store, and the host's components around it.

    The lock serialises the calls of the store, for the simple ones bear one thread; reranking is outside it.
    """

    def __init__(self, reranker: KalmReranker) -> None:
        self.reranker = reranker
        self.lock = threading.RLock()

    @abstractmethod
    def make(self, key: str, text: str) -> Any:
        """Return a document of the host."""

    @abstractmethod
    def encoded(self, documents: Sequence[Any]) -> list[Any]:
        """Return the documents with encodings, as the ingest component makes them."""

    @abstractmethod
    def put(self, documents: Sequence[Any]) -> None:
        """Add documents, or replace those of the same key."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Delete documents."""

    @abstractmethod
    def get(self, keys: Sequence[str]) -> list[Any]:
        """Return documents as the store holds them."""

    @abstractmethod
    def search(self, query: str, keys: Sequence[str], k: int) -> list[Any]:
        """Return k documents; a store that cannot search returns those of `keys`."""

    @abstractmethod
    def rerank(self, query: str, documents: Sequence[Any]) -> list[Found]:
        """Return all documents, reranked; those without a valid encoding are written back."""

    @abstractmethod
    def backfill(self) -> object:
        """Encode what is not encoded, and return the report."""

    @abstractmethod
    def texts(self) -> dict[str, str]:
        """Return the text of every document that the store holds."""

    def read(self, document: Any) -> tuple[str, dict[str, Any]]:
        """Return a document's key and metadata."""
        return document.id, document.metadata

    def with_metadata(self, document: Any, metadata: dict[str, Any]) -> Any:
        """Return a document with other metadata."""
        return document.model_copy(update={"metadata": metadata})

    def write_back(self, write: Any) -> Any:
        """Return a write-back that takes the store's lock."""

        def locked(documents: Sequence[Any]) -> None:
            with self.lock:
                write(documents)

        return locked


class LangChainShelf(Shelf):
    def __init__(self, reranker: KalmReranker, store: Any) -> None:
        super().__init__(reranker)
        self.store = store
        self.encoder = langchain.KalmPassageEncoder(model=reranker)
        self.ranker = langchain.KalmRerank(
            model=reranker, top_n=None, write_back=self.write_back(langchain.write_back_to(store))
        )

    def make(self, key, text):
        return LangChainDocument(id=key, page_content=text, metadata={"key": key})

    def encoded(self, documents):
        return list(self.encoder.transform_documents(documents))

    def put(self, documents):
        self.store.add_documents(list(documents), ids=[document.id for document in documents])

    def delete(self, keys):
        self.store.delete(list(keys))

    def get(self, keys):
        return self.store.get_by_ids(list(keys))

    def search(self, query, keys, k):
        return self.store.similarity_search(query, k=k)

    def rerank(self, query, documents):
        ranked = self.ranker.compress_documents(documents, query)
        return [Found(d.metadata["key"], d.page_content, d.metadata["relevance_score"]) for d in ranked]

    def backfill(self):
        return langchain.backfill(self.store, self.encoder, show_progress=False)

    def texts(self):
        if isinstance(self.store, Chroma):
            # Its search is approximate, and may leave a document out.
            held = self.store.get()
            return {metadata["key"]: text for metadata, text in zip(held["metadatas"], held["documents"], strict=True)}
        found = self.store.similarity_search("all", k=10**4)
        return {document.metadata["key"]: document.page_content for document in found}


class LlamaIndexShelf(Shelf):
    def __init__(self, reranker: KalmReranker, store: Any) -> None:
        super().__init__(reranker)
        self.store = store
        self.encoder = llama_index.KalmPassageEncoder(reranker)
        self.ranker = llama_index.KalmRerank(
            reranker, top_n=None, write_back=self.write_back(llama_index.write_back_to(store))
        )

    def make(self, key, text):
        return TextNode(id_=key, text=text, embedding=EMBEDDINGS.embed_query(text))

    def encoded(self, documents):
        return list(self.encoder(documents))

    def read(self, document):
        return document.node_id, document.metadata

    def rerank(self, query, documents):
        ranked = self.ranker.postprocess_nodes([NodeWithScore(node=node, score=0.5) for node in documents], QueryBundle(query))
        return [Found(node.node_id, node.text, node.score) for node in ranked]

    def backfill(self):
        return llama_index.backfill(self.store, self.encoder, show_progress=False)


class DocstoreShelf(LlamaIndexShelf):
    def put(self, documents):
        self.store.add_documents(documents)

    def delete(self, keys):
        for key in keys:
            self.store.delete_document(key)

    def get(self, keys):
        return self.store.get_nodes(list(keys))

    def search(self, query, keys, k):
        return self.store.get_nodes(list(keys)[:k])

    def texts(self):
        return {key: node.text for key, node in self.store.docs.items()}


class NodeVectorShelf(LlamaIndexShelf):
    def put(self, documents):
        self.delete([node.node_id for node in documents])
        # The store returns nodes without their vectors.
        vectors = {node.node_id: node.embedding or EMBEDDINGS.embed_query(node.text) for node in documents}
        self.store.add([node.model_copy(update={"embedding": vectors[node.node_id]}) for node in documents])

    def delete(self, keys):
        self.store.delete_nodes(list(keys))

    def get(self, keys):
        return self.store.get_nodes(list(keys))

    def search(self, query, keys, k):
        found = self.store.query(VectorStoreQuery(query_embedding=EMBEDDINGS.embed_query(query), similarity_top_k=k))
        return list(found.nodes)

    def texts(self):
        return {node.node_id: node.text for node in self.store.get_nodes(None)}


class HaystackShelf(Shelf):
    def __init__(self, reranker: KalmReranker, store: Any) -> None:
        super().__init__(reranker)
        self.store = store
        self.encoder = haystack.KalmDocumentEncoder(model=reranker, progress_bar=False)
        self.ranker = haystack.KalmRanker(model=reranker, top_k=None, write_back=self.write_back(self._write))

    def _write(self, documents):
        # What KalmRanker(document_store=...) does, under the lock.
        write_encodings(access_to(self.store), self.encoder.layout.kind, {document.id: document for document in documents})

    def make(self, key, text):
        return HaystackDocument(id=key, content=text, embedding=EMBEDDINGS.embed_query(text))

    def encoded(self, documents):
        return self.encoder.run(list(documents))["documents"]

    def put(self, documents):
        self.store.write_documents(list(documents), DuplicatePolicy.OVERWRITE)

    def delete(self, keys):
        self.store.delete_documents(list(keys))

    def get(self, keys):
        return list(access_to(self.store).read(list(keys)).values())

    def search(self, query, keys, k):
        retrieve = getattr(self.store, "embedding_retrieval", None) or self.store._query_by_embedding
        return retrieve(EMBEDDINGS.embed_query(query), top_k=k)

    def read(self, document):
        return document.id, document.meta

    def with_metadata(self, document, metadata):
        return replace(document, meta=metadata)

    def rerank(self, query, documents):
        ranked = self.ranker.run(query, documents)["documents"]
        return [Found(document.id, document.content, document.score) for document in ranked]

    def backfill(self):
        return haystack.backfill(self.store, self.encoder, progress_bar=False)

    def texts(self):
        return {document.id: document.content for document in self.store.filter_documents()}


def open_shelves(reranker: KalmReranker, folder: Path) -> dict[str, Shelf]:
    """Open two stores of each host, all in memory or in a folder."""
    nodes, client = (
        chromadb.PersistentClient(str(folder / name), Settings(anonymized_telemetry=False)) for name in ("nodes", "documents")
    )
    collection = nodes.get_or_create_collection("nodes")
    qdrant = QdrantDocumentStore(
        path=str(folder / "qdrant"), embedding_dim=DIMENSION, return_embedding=True, progress_bar=False
    )
    chroma = Chroma("documents", EMBEDDINGS, client=client)
    return {
        "LangChain, in memory": LangChainShelf(reranker, InMemoryVectorStore(EMBEDDINGS)),
        "LangChain, Chroma": LangChainShelf(reranker, chroma),
        "LlamaIndex, docstore": DocstoreShelf(reranker, SimpleDocumentStore()),
        "LlamaIndex, Chroma": NodeVectorShelf(reranker, ChromaVectorStore(chroma_collection=collection)),
        "Haystack, in memory": HaystackShelf(reranker, InMemoryDocumentStore(embedding_similarity_function="cosine")),
        "Haystack, Qdrant": HaystackShelf(reranker, qdrant),
    }
